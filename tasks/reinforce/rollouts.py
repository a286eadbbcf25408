"""What generates: vLLM in the trainer's process where it fits beside the model that learns, else transformers.

Of transformers it is continuous batching, and `generate` for what that can't do.

    spec + config.json + bytes of the weights + GPU -> choose_rollouts() -> Rollouts

Ring: edge (asks an interpreter).  Units: bytes.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.errors import CapacityError, MissingError, SpecError
from tasks.gptoss.layout import MODEL_TYPE
from tasks.machine import Gpu
from tasks.reinforce.vllm_python import Engine, find_engine
from tasks.specs import ReinforceSpec

logger = logging.getLogger(__name__)
_CACHE_SHARE = 0.1  # of the card, for keys and values
_LEARNING = 1.25  # of the weights' bytes, and 4 GB, is the least that learning takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """`engine` is None for transformers; `memory_share` is vLLM's part of the GPU."""

    engine: Engine | None = None
    memory_share: float = 0.0
    is_continuous: bool = False

    @property
    def name(self) -> str:
        """What the worker's spec says."""
        return "vllm" if self.engine else "continuous" if self.is_continuous else "transformers"


def choose_rollouts(
    spec: ReinforceSpec,
    config: Mapping[str, Any],  # Any: config.json
    weights_bytes: int,
    gpu: Gpu | None,
) -> Rollouts:
    """Return what generates, for a GPU or, without one, for the host.

    Raises: SpecError, MissingError or CapacityError when the spec wants vLLM and it can't be had; with `auto`
        transformers does it then.
    """
    if spec.rollouts == "continuous":
        require_continuous(spec, config)
        return Rollouts(is_continuous=True)
    if spec.rollouts == "transformers":
        return Rollouts()
    if spec.rollouts == "auto" and gpu is None:
        return choose_without_vllm(spec, config)
    try:
        engine = require_vllm(spec, config)
        return Rollouts(engine=engine, memory_share=_memory_share(spec, weights_bytes, gpu))
    except (SpecError, MissingError, CapacityError) as error:
        if spec.rollouts == "vllm":
            raise
        logger.info("transformers generates, several times slower than vLLM: %s", error)
        return choose_without_vllm(spec, config)


def choose_without_vllm(spec: ReinforceSpec, config: Mapping[str, Any]) -> Rollouts:  # Any: as above
    """Return which of transformers' two ways generates."""
    try:
        require_continuous(spec, config)
    except SpecError as error:
        logger.info("transformers' generate, not its continuous batching: %s", error)
        return Rollouts()
    return Rollouts(is_continuous=True)


def has_graphs(spec: ReinforceSpec, config: Mapping[str, Any]) -> bool:  # Any: as above
    """Say whether a step of continuous batching can be a CUDA graph: nothing in it may wait for the GPU.

    transformers' experts ask the GPU for sizes, rotations that grow with a sequence for its length, LLM.int8() for
    outliers.
    """
    text = config.get("text_config") or config
    has_own_experts = config.get("model_type") == MODEL_TYPE and spec.kernels == "auto"
    has_experts = any("experts" in name for name in text)
    return (has_own_experts or not has_experts) and not _grows(text) and spec.quantization != "int8"


def _grows(text: Mapping[str, Any]) -> bool:  # Any: as above
    """Say whether rotations follow from the length of what is there; some configs have one rope a kind of layer."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    ropes = [rope, *(each for each in rope.values() if isinstance(each, Mapping))]
    return any(each.get("rope_type", each.get("type")) in ("dynamic", "longrope", "su") for each in ropes)


def require_continuous(spec: ReinforceSpec, config: Mapping[str, Any]) -> None:  # Any: as above
    """Raise SpecError for what transformers' continuous batching can't do, or does wrongly without a word."""
    if spec.cuts_tail:
        raise SpecError(
            f"ReinforceSpec.rollouts = 'continuous' with top_p = {spec.top_p:g} and top_k = {spec.top_k}: it tells "
            "log-probabilities only behind them, which can't be held against the model's own; leave them, or use "
            "'transformers'"
        )
    if trait := trait_without_pages(config) or _growth(spec, config):
        raise SpecError(
            f"ReinforceSpec.rollouts = 'continuous' with a {config.get('model_type')}: it has {trait}; use "
            "'transformers'"
        )


def _growth(spec: ReinforceSpec, config: Mapping[str, Any]) -> str:  # Any: as above
    """Return in what way rotations change amid the spec's sequences: the keys that are kept have the old ones."""
    text, name = config.get("text_config") or config, "original_max_position_embeddings"
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    known = text.get(name) or rope.get(name) or text.get("max_position_embeddings") or spec.max_sequence_tokens
    if not _grows(text) or spec.max_sequence_tokens <= known:
        return ""
    return (
        f"a rotation that changes behind {known} tokens (max_sequence_tokens is {spec.max_sequence_tokens}), for all "
        "requests at once and not for the keys that are there"
    )


def trait_without_pages(config: Mapping[str, Any]) -> str:  # Any: as above
    """Return what of a model continuous batching fails at or gets wrong without a word; empty: nothing known."""
    text = config.get("text_config") or config
    if layers := sorted({*(text.get("layer_types") or [])} - {"full_attention", "sliding_attention"}):
        return f"layers of {layers[0]}, which have no pages"
    if text.get("attn_logit_softcapping"):
        return "an attn_logit_softcapping, which its attention leaves out"
    if text.get("use_bidirectional_attention"):
        return "attention that looks ahead"
    if text.get("kv_lora_rank"):
        return "a kv_lora_rank: keys and values of two widths, and its pages have one"
    return ""


def require_vllm(spec: ReinforceSpec, config: Mapping[str, Any]) -> Engine:  # Any: as above
    """Return the vLLM that can generate from this base. Raises SpecError or MissingError without one."""
    if config.get("quantization_config") or spec.quantization != "none":
        raise SpecError(
            "ReinforceSpec.rollouts = 'vllm' with a quantised base: vLLM would keep the blocks that it loaded and drop "
            "the adapter's change of them; use a base in bfloat16, or 'transformers'"
        )
    if spec.lora.target_parameters and config.get("model_type") != MODEL_TYPE:
        raise SpecError(
            f"ReinforceSpec.rollouts = 'vllm' with an adapter on the experts of a {config.get('model_type')}: only "
            f"those of {MODEL_TYPE} can be sent to vLLM; leave lora.target_parameters empty, or use 'transformers'"
        )
    if spec.cuts_tail and spec.temperature != 1:
        raise SpecError(
            f"ReinforceSpec.rollouts = 'vllm' with temperature = {spec.temperature:g}, top_p = {spec.top_p:g} and "
            f"top_k = {spec.top_k}: at another temperature than 1 vLLM tells log-probabilities only behind top_p and "
            "top_k, which can't be held against the model's own; change one of the two, or use 'transformers'"
        )
    return find_engine()


def _memory_share(spec: ReinforceSpec, weights_bytes: int, gpu: Gpu | None) -> float:
    """Return vLLM's part of the GPU: what the spec says, or the weights and a tenth of the card."""
    if gpu is None:
        return spec.vllm_memory_share or 0.1  # of the host, where vLLM takes what VLLM_CPU_KVCACHE_SPACE says
    total = gpu.total_bytes
    share = spec.vllm_memory_share or round(1.05 * weights_bytes / total + _CACHE_SHARE, 2)
    learning = _LEARNING * weights_bytes + 4e9
    if share * total < 1.05 * weights_bytes + 1e9 or (1 - share) * total < learning:
        raise CapacityError(
            f"a base of {weights_bytes / 1e9:.1f} GB does not fit twice into {gpu.name} ({total / 1e9:.0f} GB): vLLM "
            f"would get {share * total / 1e9:.1f} GB (ReinforceSpec.vllm_memory_share), learning takes "
            f"{learning / 1e9:.1f} GB at least; use 'transformers', or a larger card"
        )
    return share
