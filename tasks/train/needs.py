"""What a training run will need, from shapes alone, before a byte is downloaded: memory, and the attention.

    shapes + config.json + TrainSpec -> training_needs() -> {part: bytes}

Held against measured peaks (tests/tasks/train/test_needs.py): within a tenth for gpt-oss-20b on an
H200. It is meant to refuse what can't fit and to name the numbers, not to fill the last gigabyte.

Ring: pure.  Units: bytes.  Shapes: L layers, T tokens of a forward pass, H hidden, F inner, K experts per token.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from tasks.errors import SpecError
from tasks.gptoss.layout import MODEL_TYPE
from tasks.specs import TrainSpec
from tasks.train.targets import Shapes, Target

_WORKSPACE = 1 << 30  # CUDA context, allocator slack, and a block of logits of the chunked loss
_ADAPTER_BYTES = 16  # weight, gradient and two moments in float32
_STORED = {"nf4": 0.52, "int8": 1.0}  # bytes of a quantised weight, scales included
Config = Mapping[str, Any]  # Any: config.json


def training_needs(
    shapes: Shapes, config: Config, spec: TrainSpec, targets: list[Target], tokens: int
) -> dict[str, int]:
    """Return what one GPU (or the host, without one) holds at the peak of a step, by part.

    Args:
        shapes: parameter name -> shape of the base as loaded.
        config: its config.json.
        spec: dtype, quantisation, checkpointing.
        targets: what gets an adapter (`find_targets`).
        tokens: tokens of one forward pass, `row_tokens * rows_per_device`.
    """
    element = 4 if spec.dtype == "float32" else 2
    return {
        "weights": sum(round(prod(size) * _stored_bytes(name, size, spec, element)) for name, size in shapes.items()),
        "adapter and optimizer": _ADAPTER_BYTES * sum(target.num_trainable for target in targets),
        "experts with their change": _formed_bytes(targets, spec, element),
        "activations": _activation_bytes(config, spec, element, tokens),
        "workspace": _WORKSPACE,
    }


def choose_attention(model_type: str, wanted: str, *, on_gpu: bool) -> str:
    """Return transformers' attention for training: gpt-oss has sinks, which only eager and (on CUDA) flex handle.

    Raises: SpecError for an attention that would drop the sinks without a word.

    >>> choose_attention("gpt_oss", "auto", on_gpu=False), choose_attention("qwen2", "auto", on_gpu=True)
    ('eager', 'sdpa')
    """
    if model_type != MODEL_TYPE:
        return "sdpa" if wanted == "auto" else wanted
    if wanted == "sdpa":
        raise SpecError("TrainSpec.attention 'sdpa' drops the sinks of gpt-oss: use flex_attention, eager or auto")
    if wanted == "flex_attention" and not on_gpu:
        raise SpecError("TrainSpec.attention 'flex_attention' needs CUDA for the sinks of gpt-oss: use eager or auto")
    return wanted if wanted != "auto" else "flex_attention" if on_gpu else "eager"


def say_needs(needs: Mapping[str, int]) -> str:
    """Write the parts, largest first.

    >>> say_needs({"weights": 41_800_000_000, "workspace": 1_100_000_000, "experts": 0})
    '42.9 GB (weights 41.8, workspace 1.1)'
    """
    parts = [f"{name} {size / 1e9:.1f}" for name, size in sorted(needs.items(), key=lambda part: -part[1]) if size]
    return f"{sum(needs.values()) / 1e9:.1f} GB ({', '.join(parts)})"


def _stored_bytes(name: str, size: tuple[int, ...], spec: TrainSpec, element: int) -> float:
    """Of a quantised base the Linear weights are stored in less; embeddings, head, norms and 3-D experts stay."""
    is_linear = len(size) == 2 and ".layers." in name and name.endswith(".weight")
    return _STORED[spec.quantization] if is_linear and spec.quantization != "none" else element


def _formed_bytes(targets: list[Target], spec: TrainSpec, element: int) -> int:
    """PEFT forms W + BA of an expert tensor and a full gradient for it: one layer's with checkpointing, else all."""
    by_layer: dict[str, int] = {}
    for target in targets:
        if len(target.shape) == 3:
            layer = target.name.partition(".layers.")[2].partition(".")[0]
            by_layer[layer] = by_layer.get(layer, 0) + prod(target.shape) * element
    largest = max(by_layer.values(), default=0)
    return 2 * largest if spec.gradient_checkpointing else largest + sum(by_layer.values())


def _activation_bytes(config: Config, spec: TrainSpec, element: int, tokens: int) -> int:
    """Inputs of each layer and the inside of one (checkpointing), or the insides of all."""
    num_layers, hidden = config.get("num_hidden_layers", 0), config.get("hidden_size", 0)
    heads = config.get("num_attention_heads", 0)
    head_dim = config.get("head_dim") or hidden // max(1, heads)
    kept_heads = heads + 2 * config.get("num_key_value_heads", heads)
    per_expert = 5 * config.get("intermediate_size", 0) + hidden
    per_token = 8 * hidden + 2 * kept_heads * head_dim + (config.get("num_experts_per_tok") or 1) * per_expert
    inside = tokens * per_token * element
    if spec.attention == "eager":
        inside += heads * tokens * tokens * (element + 4)
    inputs = num_layers * tokens * hidden * element
    return inputs + inside if spec.gradient_checkpointing else num_layers * inside
