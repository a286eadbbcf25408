"""Plan which base tensors an adapter changes, before any weight is read.

    safetensors headers + adapter_config.json -> plan_merge() -> MergePlan -> run.py streams it

Works on names and shapes only, so a 120B model is planned in milliseconds and every mismatch
surfaces before the first gigabyte moves.

Ring: pure.  Shapes: E experts, I in-features, O out-features, R rank.
Trap: PEFT's keys do not hold the parameter's name. Of several wrapped parameters of one module
      the first in module order is innermost: it has the most `.base_layer` in its key.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from tasks.errors import ShapeError, SpecError
from tasks.gptoss.layout import EXPERT_PARAMETERS, parameter_name, quantized_stem

Headers = dict[str, dict[str, Any]]  # Any: dtype, shape, data_offsets of safetensors
_KEY = re.compile(
    r"^base_model\.model\.(?P<module>.+?)(?P<nesting>(?:\.base_layer)*)\.lora_(?P<side>[AB])(?:\.default)?\.weight$"
)
_PREFIX = "base_model.model."
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable tokens",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "layer_replication": "layer replication",
    "fan_in_fan_out": "fan_in_fan_out",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One LoRA pair and the parameter it changes."""

    a_key: str
    b_key: str
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One tensor of the merged model. `sources` are stored names: one, or MXFP4 blocks and scales."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    change: Change | None

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)

    @property
    def is_quantized(self) -> bool:
        """Whether the source is MXFP4."""
        return len(self.sources) == 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """Every output tensor, grouped into shards in the base's order."""

    shards: tuple[tuple[Output, ...], ...]
    element_bytes: int

    @property
    def outputs(self) -> list[Output]:
        """All outputs, shard by shard."""
        return [output for shard in self.shards for output in shard]

    @property
    def total_bytes(self) -> int:
        """Size of all weights together."""
        return sum(output.num_elements for output in self.outputs) * self.element_bytes


def plan_merge(
    base: Headers, adapter: Headers, config: dict[str, Any], *, element_bytes: int, shard_bytes: int
) -> MergePlan:  # Any: adapter_config.json
    """Match every adapter tensor to a base tensor.

    Raises:
        SpecError: the adapter is of a kind that this merge does not do.
        ShapeError: a tensor of the adapter is unused, has no partner, or does not fit its target.
    """
    refuse_unsupported(config)
    outputs = _plain_outputs(base)
    changes = _changes(outputs, adapter, config)
    merged = [
        Output(name=o.name, shape=o.shape, sources=o.sources, change=changes.get(o.name)) for o in outputs.values()
    ]
    return MergePlan(shards=_shards(merged, element_bytes, shard_bytes), element_bytes=element_bytes)


def refuse_unsupported(config: dict[str, Any]) -> None:  # Any: adapter_config.json
    """Raise SpecError naming what this adapter uses that plain LoRA does not."""
    if config.get("peft_type") != "LORA":
        raise SpecError(f"adapter is of type {config.get('peft_type')}, expected LORA")
    used = [label for field, label in _REFUSED.items() if config.get(field)]
    if config.get("bias", "none") != "none":
        used.append(f"bias={config['bias']}")
    if used:
        raise SpecError(f"adapter uses {', '.join(used)}, which can't be merged here: use PEFT's merge_and_unload")


def _plain_outputs(base: Headers) -> dict[str, Output]:
    """Name each parameter of the merged model, with MXFP4 pairs folded into one."""
    outputs: dict[str, Output] = {}
    for stored, entry in base.items():
        name = parameter_name(stored)
        if name is None:
            continue
        shape, sources = tuple(entry["shape"]), (stored,)
        if quantized_stem(stored):
            num_experts, out, groups, _ = shape
            shape, sources = (num_experts, groups * 32, out), (stored, f"{name}_scales")
            if sources[1] not in base:
                raise ShapeError(f"base has {stored} without {sources[1]}: download it again")
        outputs[name] = Output(name=name, shape=shape, sources=sources, change=None)
    return outputs


def _changes(outputs: dict[str, Output], adapter: Headers, config: dict[str, Any]) -> dict[str, Change]:
    pairs = _pairs(adapter)
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    changes: dict[str, Change] = {}
    for (module, depth), sides in pairs.items():
        missing = {"A", "B"} - sides.keys()
        if missing:
            raise ShapeError(
                f"adapter has {sides.popitem()[1]} without its lora_{missing.pop()}: train or copy it again"
            )
        target = _target_name(module, depth, pairs, outputs, config)
        _check_fit(outputs[target], adapter[sides["A"]]["shape"], adapter[sides["B"]]["shape"], config["r"])
        changes[target] = Change(a_key=sides["A"], b_key=sides["B"], scale=scale)
    if not changes:
        raise ShapeError("adapter holds no LoRA tensors: the merged model would be the base")
    return changes


def _pairs(adapter: Headers) -> dict[tuple[str, int], dict[str, str]]:
    """Group keys by (module, number of `.base_layer`) into {"A": key, "B": key}."""
    pairs: dict[tuple[str, int], dict[str, str]] = {}
    for key in adapter:
        match = _KEY.match(key)
        if match is None:
            raise ShapeError(f"adapter tensor {key} is no LoRA weight: this merge would drop it")
        depth = match["nesting"].count(".base_layer")
        pairs.setdefault((match["module"], depth), {})[match["side"]] = key
    return pairs


def _target_name(
    module: str,
    depth: int,
    pairs: dict[tuple[str, int], dict[str, str]],
    outputs: dict[str, Output],
    config: dict[str, Any],
) -> str:
    if f"{module}.weight" in outputs and depth == 0:
        return f"{module}.weight"
    targets = config.get("target_parameters") or []
    wrapped = [
        f"{module}.{name}"
        for name in EXPERT_PARAMETERS
        if f"{module}.{name}" in outputs
        and any(f"{module}.{name}" == t or f"{module}.{name}".endswith("." + t) for t in targets)
    ]
    num_pairs = sum(other == module for other, _ in pairs)
    if num_pairs != len(wrapped) or depth >= len(wrapped):
        raise ShapeError(
            f"adapter has {num_pairs} LoRA pairs on {module} but the base has {len(wrapped)} targeted parameters there "
            f"({', '.join(wrapped) or 'none'}): adapter and base do not belong together"
        )
    return wrapped[len(wrapped) - 1 - depth]


def _check_fit(output: Output, a_shape: list[int], b_shape: list[int], rank: int) -> None:
    num_experts = output.shape[0] if len(output.shape) == 3 else 1
    out_features, in_features = (
        (output.shape[2], output.shape[1]) if len(output.shape) == 3 else (output.shape[0], output.shape[1])
    )
    expected = ([num_experts * rank, in_features], [out_features, num_experts * rank])
    if (list(a_shape), list(b_shape)) != expected:
        raise ShapeError(
            f"adapter does not fit {output.name} {output.shape}: A is {a_shape}, B is {b_shape}, expected "
            f"{expected[0]} and {expected[1]}; it was trained on another base"
        )


def _shards(outputs: list[Output], element_bytes: int, shard_bytes: int) -> tuple[tuple[Output, ...], ...]:
    """Fill shards in order; a tensor larger than a shard gets one of its own."""
    shards: list[list[Output]] = [[]]
    used = 0
    for output in outputs:
        size = output.num_elements * element_bytes
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(output)
        used += size
    return tuple(tuple(shard) for shard in shards)


def shard_names(count: int) -> list[str]:
    """Return transformers' file names.

    >>> shard_names(1), shard_names(2)[1]
    (['model.safetensors'], 'model-00002-of-00002.safetensors')
    """
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
