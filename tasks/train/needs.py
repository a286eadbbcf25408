"""What a training run will need, from shapes alone, before a byte is downloaded: memory, and the attention.

    shapes + config.json + TrainSpec -> training_needs() -> {part: bytes}

Held against measured peaks (tests/tasks/train/test_needs.py): within a tenth for gpt-oss-20b on an
H200. It refuses what can't fit and lets plan.py choose what does.

Ring: pure.  Units: bytes.  Shapes: L layers, T tokens of a forward pass, H hidden, F inner, K experts per token.
"""

from collections.abc import Mapping
from math import prod

from tasks.costs import FROZEN_HEAD_ROWS
from tasks.errors import SpecError
from tasks.gptoss.layout import MODEL_TYPE
from tasks.specs import TrainSpec
from tasks.targets import Shapes, Target, first_trained_layer, layer_number
from tasks.train.weights import Config, matrix_bytes, resting_bytes, rests_packed, stored_sizes

_WORKSPACE = 1 << 30  # CUDA context, allocator slack, and a block of logits of the chunked loss
_FUSED_WORKSPACE = 1 << 29  # the experts' appended rows, bf16 copies of the adapter, allocator slack
_OUR_ATTENTION = ("auto", "flash")
_ADAPTER_BYTES = 16  # weight, gradient and two moments in float32


def training_needs(
    shapes: Shapes,
    config: Config,
    spec: TrainSpec,
    targets: list[Target],
    tokens: int,
    checkpointing: str,
    num_recomputed: int = 0,
    num_offloaded: int = 0,
    num_shelved: int = 0,
) -> dict[str, int]:
    """Return what one GPU (or the host, without one) holds at the peak of a step, by part.

    Args:
        shapes: parameter name -> shape of the base as loaded.
        config: its config.json.
        spec: dtype, quantisation, kernels.
        targets: what gets an adapter (`find_targets`).
        tokens: tokens of one pass, `row_tokens * rows_per_device`.
        checkpointing: none, offload, selective or full.
        num_recomputed: selective: layers whose gate is recomputed.
        num_offloaded: layers that rest in the host's memory; two of them are on the GPU at a time.
        num_shelved: offload: layers whose gate rests in the host's memory between the two halves of a pass.
    """
    element = 4 if spec.dtype == "float32" else 2
    unused, is_full = first_trained_layer(targets), checkpointing == "full"
    needs = {
        **_weight_bytes(stored_sizes(shapes, spec), shapes, spec),
        "adapter and optimizer": _ADAPTER_BYTES * sum(target.num_trainable for target in targets),
    }
    if uses_fused_kernels(config, spec):
        needs["weights"] -= embedding_bytes(shapes, config, spec)
        kept, inside = _fused_activations(config, spec, tokens, checkpointing, num_recomputed, num_shelved, unused)
        logits = 2 * element * min(tokens, FROZEN_HEAD_ROWS) * config.get("vocab_size", 0)
        needs |= {"activations": kept, "work of one layer": max(inside, logits), "workspace": _FUSED_WORKSPACE}
    else:
        kept, inside = _stock_activations(config, spec, element, tokens, unused, is_full=is_full)
        formed = _formed_bytes(targets, element, is_full=is_full)
        needs |= {"experts with their change": formed, "activations": kept + inside, "workspace": _WORKSPACE}
    if resting := resting_bytes(shapes, config, spec, num_offloaded):
        unpacked = matrix_bytes(shapes, stored_sizes(shapes, spec), num_offloaded)
        needs["weights"] -= sum(unpacked)
        # Two at a time, one of them unpacked, and gone when the layers above have filled the memory of activations.
        passing = sum(sorted(resting)[-2:]) + (max(unpacked) if rests_packed(config, spec) else 0)
        needs["layers in passage"] = max(0, passing - kept)
    return needs


def host_bytes(shapes: Shapes, config: Config, spec: TrainSpec, num_offloaded: int = 0) -> int:
    """Return what a base takes of the host's memory beside a GPU: of layers that rest there, and while it is loaded.

    With FSDP2, or to let layers rest, each process makes its base there, but one in nf4 layer by layer, and of one in
    MXFP4 only the layers that do not rest. Weights that are stored as they are used are pages of their files, which
    processes share and the kernel takes back; unpacked or converted ones are a copy in each process.
    """
    resting = sum(resting_bytes(shapes, config, spec, num_offloaded))
    whole = (4 if spec.dtype == "float32" else 2) * sum(map(prod, shapes.values()))
    if resting and rests_packed(config, spec):
        return resting + whole - sum(matrix_bytes(shapes, stored_sizes(shapes, spec), num_offloaded))
    resting += embedding_bytes(shapes, config, spec)
    stored_as = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    is_copied = bool(config.get("quantization_config")) or stored_as != spec.dtype
    is_made_there = spec.parallel == "fsdp2" or (num_offloaded > 0 and spec.quantization == "none")
    if not is_made_there or not is_copied:
        return resting
    return max(resting, spec.num_processes * whole)


def require_aligned(config: Config, spec: TrainSpec) -> None:
    """Raise SpecError when torch's grouped GEMM can't multiply the experts: it wants rows of 16 bytes.

    >>> from tasks.specs import LoraSpec
    >>> spec = TrainSpec(lora=LoraSpec(target_modules=("q_proj",)))
    >>> require_aligned({"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880}, spec)
    """
    if config.get("model_type") != MODEL_TYPE:
        return
    step = 16 // (4 if spec.dtype == "float32" else 2)
    odd = {name: config[name] for name in ("hidden_size", "intermediate_size") if config[name] % step}
    if odd:
        raise SpecError(f"the base has {odd}, but in {spec.dtype} its experts are trained in multiples of {step} only")


def require_quantizable(config: Config, spec: TrainSpec) -> None:
    """Raise SpecError for a base that is stored quantised and is to be quantised again: transformers takes one only."""
    stored = config.get("quantization_config")
    if stored and spec.quantization != "none":
        raise SpecError(
            f"TrainSpec.quantization = {spec.quantization} (USE_4BIT) but the base is stored as "
            f"{stored.get('quant_method')}: set it to none (False), which trains on it unpacked, or name a base in "
            "bfloat16"
        )


def uses_fused_kernels(config: Config, spec: TrainSpec) -> bool:
    """Say whether our kernels run below this model: gpt-oss, unless the recipe says stock.

    >>> from tasks.specs import LoraSpec
    >>> uses_fused_kernels({"model_type": "qwen2"}, TrainSpec(lora=LoraSpec(target_modules=("q_proj",))))
    False
    """
    return spec.kernels != "stock" and config.get("model_type") == MODEL_TYPE


def embedding_bytes(shapes: Shapes, config: Config, spec: TrainSpec) -> int:
    """Return what an embedding takes that rests in the host's memory (tasks/gptoss/embedding.py), 0 where none does.

    DDP and FSDP2 hand parameters round as they start, and would not find it.
    """
    if not rests_embedding(config, spec):
        return 0
    return sum(2 * prod(shape) for name, shape in shapes.items() if name.endswith("embed_tokens.weight"))


def rests_embedding(config: Config, spec: TrainSpec) -> bool:
    """Say whether the input embedding rests on the host: one process with our kernels, on a GPU (bfloat16)."""
    is_alone = spec.num_processes == 1 and spec.parallel == "ddp" and spec.dtype == "bfloat16"
    return is_alone and uses_fused_kernels(config, spec) and not config.get("tie_word_embeddings", False)


def choose_attention(model_type: str, spec: TrainSpec, *, on_gpu: bool) -> str:
    """Return the attention for training: gpt-oss has sinks, which only eager, flex (on CUDA) and our flash handle.

    `flash` is tasks/gptoss/attention.py; every other name is transformers'.
    Raises: SpecError for an attention that would drop the sinks without a word, or that has no kernel here.

    >>> from tasks.specs import LoraSpec
    >>> lora = LoraSpec(target_modules=("q_proj",))
    >>> [choose_attention("gpt_oss", TrainSpec(lora=lora), on_gpu=gpu) for gpu in (False, True)]
    ['eager', 'flash']
    >>> choose_attention("qwen2", TrainSpec(lora=lora), on_gpu=True)
    'sdpa'
    """
    wanted = spec.attention
    if model_type != MODEL_TYPE:
        if wanted == "flash":
            raise SpecError(
                f"TrainSpec.attention 'flash' is for gpt-oss, but the base is {model_type}: use sdpa or auto"
            )
        return "sdpa" if wanted == "auto" else wanted
    has_flash = spec.kernels != "stock" and (not on_gpu or spec.dtype == "bfloat16")
    if wanted == "flash" and not has_flash:
        raise SpecError(
            f"TrainSpec.attention 'flash' needs dtype bfloat16 on a GPU and kernels other than stock, but they are "
            f"{spec.dtype} and {spec.kernels}: change them, or use flex_attention"
        )
    if wanted == "sdpa":
        raise SpecError("TrainSpec.attention 'sdpa' drops the sinks of gpt-oss: use flash, eager or auto")
    if wanted == "flex_attention" and not on_gpu:
        raise SpecError("TrainSpec.attention 'flex_attention' needs CUDA for the sinks of gpt-oss: use eager or auto")
    if wanted != "auto":
        return wanted
    return "eager" if not on_gpu else "flash" if has_flash else "flex_attention"


def _weight_bytes(stored: Mapping[str, int], shapes: Shapes, spec: TrainSpec) -> dict[str, int]:
    """Return what the base takes: all of it, or with FSDP2 a part and what is gathered at once.

    Gathered are what lies around the layers, three layers (the one that passes, the next one's buffer, its copy), and
    the widest expert tensor with its adapter's rows appended.
    """
    whole = sum(stored.values())
    if spec.parallel == "ddp":
        return {"weights": whole}
    layers: dict[int | None, int] = {}  # None: around them
    for name, size in stored.items():
        layer = layer_number(name)
        layers[layer] = layers.get(layer, 0) + size
    around = layers.pop(None, 0)
    widest = max((size for name, size in stored.items() if len(shapes[name]) == 3), default=0)
    gathered = around + 3 * max(layers.values(), default=0) + widest
    return {"weights": -(-whole // spec.num_processes), "gathered layers": gathered}


def _fused_activations(
    config: Config, spec: TrainSpec, tokens: int, checkpointing: str, num_recomputed: int, num_shelved: int, unused: int
) -> tuple[int, int]:
    """Return what a pass keeps for its backward half, and what the widest moment of one layer adds.

    The backward pass ends at the lowest adapter: the `unused` layers below it keep nothing.

    Kept of a layer: both norms' inputs (H each), q, k, v, the attention's output and its log-sum-exp, and for each of K
    experts the gate's argument (2 F), which `selective` makes again and `offload` sends to the host; where layers are
    not joined (joint.py) the experts' input, too.
    """
    num_layers, hidden, inner = (config.get(n, 0) for n in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    heads, chosen = config.get("num_attention_heads", 0), config.get("num_experts_per_tok") or 1
    keys = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // max(1, heads)
    is_joined = spec.parallel == "ddp" and spec.quantization == "none" and not spec.lora.dropout
    element, num_inputs = (
        4 if spec.dtype == "float32" else 2,
        2 if is_joined and spec.attention in _OUR_ATTENTION else 3,
    )
    plain = tokens * (element * (num_inputs * hidden + 2 * (heads + keys) * head_dim) + 4 * heads)
    gate = _gate_bytes(config, spec, tokens)
    inside = tokens * chosen * (hidden + 4 * inner) * element
    if checkpointing == "full":
        return (num_layers - unused) * tokens * hidden * element, inside + plain + gate
    with_gate = num_layers - max(unused, num_recomputed) - max(0, num_shelved - 1)  # one is on its way
    return (num_layers - unused) * plain + with_gate * gate, inside


def _gate_bytes(config: Config, spec: TrainSpec, tokens: int) -> int:
    element, chosen = 4 if spec.dtype == "float32" else 2, config.get("num_experts_per_tok") or 1
    return tokens * chosen * 2 * config.get("intermediate_size", 0) * element


def shelf_bytes(config: Config, spec: TrainSpec, tokens: int, num_shelved: int) -> int:
    """Return what gates take in the host's memory: torch pins pages of a power of two.

    Args:
        config: the base's config.json.
        spec: dtype, and how many processes have a shelf each.
        tokens: of one pass.
        num_shelved: layers whose gate rests there.
    """
    page = 1 << (_gate_bytes(config, spec, tokens) - 1).bit_length()
    return spec.num_processes * num_shelved * page if num_shelved else 0


def _formed_bytes(targets: list[Target], element: int, *, is_full: bool) -> int:
    """PEFT forms W + BA of an expert tensor and a full gradient for it: one layer's with checkpointing, else all."""
    by_layer: dict[str, int] = {}
    for target in targets:
        if len(target.shape) == 3:
            layer = target.name.partition(".layers.")[2].partition(".")[0]
            by_layer[layer] = by_layer.get(layer, 0) + prod(target.shape) * element
    largest = max(by_layer.values(), default=0)
    return 2 * largest if is_full else largest + sum(by_layer.values())


def _stock_activations(
    config: Config, spec: TrainSpec, element: int, tokens: int, unused: int, *, is_full: bool
) -> tuple[int, int]:
    """Return what a pass keeps, each layer's input or (without checkpointing) inside, and the inside of one layer.

    The `unused` lowest layers keep nothing.
    """
    num_layers, hidden = config.get("num_hidden_layers", 0), config.get("hidden_size", 0)
    heads = config.get("num_attention_heads", 0)
    head_dim = config.get("head_dim") or hidden // max(1, heads)
    kept_heads = heads + 2 * (config.get("num_key_value_heads") or heads)
    per_expert = 5 * config.get("intermediate_size", 0) + hidden
    per_token = 8 * hidden + 2 * kept_heads * head_dim + (config.get("num_experts_per_tok") or 1) * per_expert
    inside = tokens * per_token * element
    if spec.attention == "eager":
        inside += heads * tokens * tokens * (element + 4)
    trained = num_layers - unused
    return trained * tokens * hidden * element if is_full else max(0, trained - 1) * inside, inside
