"""Plan which base tensors an adapter changes and how each is stored, before any weight is read.

    safetensors headers + adapter_config.json -> plan_merge() -> MergePlan -> run.py streams it

Works on names and shapes only, so a 120B model is planned in milliseconds and every mismatch
surfaces before the first gigabyte moves.

Ring: pure.  Shapes: E experts, I in-features, O out-features, R rank.
Trap: PEFT's keys do not hold the parameter's name. Of several wrapped parameters of one module
      the first in module order is innermost: it has the most `.base_layer` in its key.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from tasks.errors import ShapeError, SpecError
from tasks.gptoss.layout import EXPERT_PARAMETERS, parameter_name, quantized_stem
from tasks.gptoss.mxfp4 import BLOCK_VALUES, packed_shapes
from tasks.merge.adapter import rank_and_scale, refuse_unsupported

Headers = dict[str, dict[str, Any]]  # Any: dtype, shape, data_offsets of safetensors
ELEMENT_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
_FLOATS = {"F32", "BF16", "F16"}
_KEY = re.compile(
    r"^base_model\.model\.(?P<module>.+?)(?P<nesting>(?:\.base_layer)*)\.lora_(?P<side>[AB])(?:\.default)?\.weight$"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One LoRA pair and the parameter it changes."""

    a_key: str
    b_key: str
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One parameter of the merged model: the stored tensors that it comes from and those that it becomes.

    Both are one, or the blocks and scales of MXFP4.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Stored, ...]
    stored: tuple[Stored, ...]
    change: Change | None

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return sum(stored.num_bytes for stored in self.stored)

    @property
    def num_experts(self) -> int:
        """Size of the first axis of a 3-D parameter; 0 of any other."""
        return self.shape[0] if len(self.shape) == 3 else 0

    @property
    def is_copied(self) -> bool:
        """Whether its bytes stay what they are."""
        return self.change is None and self.sources == self.stored


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """Every output parameter, grouped into shards in the base's order."""

    shards: tuple[tuple[Output, ...], ...]

    @property
    def outputs(self) -> list[Output]:
        """All outputs, shard by shard."""
        return [output for shard in self.shards for output in shard]

    @property
    def total_bytes(self) -> int:
        """Size of all weights together."""
        return sum(output.num_bytes for output in self.outputs)


def plan_merge(
    base: Headers, adapter: Headers, config: dict[str, Any], *, dtype: str, experts: str, shard_bytes: int
) -> MergePlan:  # Any: adapter_config.json
    """Match every adapter tensor to a base tensor.

    Args:
        base: headers of the base's files.
        adapter: headers of the adapter's file.
        config: adapter_config.json.
        dtype: safetensors' name of what floating-point tensors become.
        experts: "plain" for that type too, "mxfp4" for blocks and scales.
        shard_bytes: largest shard.

    Raises:
        SpecError: the adapter or the base is of a kind that this merge does not do.
        ShapeError: a tensor of the adapter is unused, has no partner, or does not fit its target.
    """
    refuse_unsupported(config)
    outputs = _outputs(base, dtype, experts)
    changes = _changes(outputs, adapter, config)
    merged = [replace(output, change=changes.get(output.name)) for output in outputs.values()]
    return MergePlan(shards=_shards(merged, shard_bytes))


def _outputs(base: Headers, dtype: str, experts: str) -> dict[str, Output]:
    """Name each parameter of the merged model, with MXFP4 pairs folded into one."""
    outputs: dict[str, Output] = {}
    for name, stored in ((parameter_name(stored), stored) for stored in base):
        if name is None:
            continue
        sources = (_stored(stored, base[stored]),)
        shape = sources[0].shape
        if quantized_stem(stored):
            scales = f"{name}_scales"
            if scales not in base:
                raise ShapeError(f"base has {stored} without {scales}: download it again")
            num_experts, out, groups, _ = shape
            shape, sources = (num_experts, groups * BLOCK_VALUES, out), (sources[0], _stored(scales, base[scales]))
        is_expert = len(shape) == 3 and name.endswith(tuple(f".{part}" for part in EXPERT_PARAMETERS))
        kept = (Stored(name=name, dtype=_stored_dtype(sources, dtype), shape=shape),)
        packed = _packed(name, shape) if experts == "mxfp4" and is_expert else kept
        outputs[name] = Output(name=name, shape=shape, sources=sources, stored=packed, change=None)
    if experts == "mxfp4" and not any(len(output.stored) == 2 for output in outputs.values()):
        raise SpecError("MergeSpec.experts = mxfp4 but the base has no fused experts: leave it at plain")
    return outputs


def _stored(name: str, entry: dict[str, Any]) -> Stored:  # Any: header entry
    if entry["dtype"] not in ELEMENT_BYTES:
        raise SpecError(
            f"base tensor {name} is of type {entry['dtype']}: name its bf16, fp16, fp32 or MXFP4 checkpoint"
        )
    return Stored(name=name, dtype=entry["dtype"], shape=tuple(entry["shape"]))


def _stored_dtype(sources: tuple[Stored, ...], dtype: str) -> str:
    """Floats take the asked type; integers and masks stay what they are."""
    return dtype if len(sources) == 2 or sources[0].dtype in _FLOATS else sources[0].dtype


def _packed(name: str, shape: tuple[int, ...]) -> tuple[Stored, ...]:
    if shape[1] % BLOCK_VALUES:
        raise SpecError(f"{name} {shape} has no multiple of {BLOCK_VALUES} in-features: MXFP4 can't hold it")
    blocks, scales = packed_shapes(shape)
    return (
        Stored(name=f"{name}_blocks", dtype="U8", shape=blocks),
        Stored(name=f"{name}_scales", dtype="U8", shape=scales),
    )


def _changes(outputs: dict[str, Output], adapter: Headers, config: dict[str, Any]) -> dict[str, Change]:
    pairs = _pairs(adapter)
    changes: dict[str, Change] = {}
    for (module, depth), sides in pairs.items():
        missing = {"A", "B"} - sides.keys()
        if missing:
            raise ShapeError(
                f"adapter has {sides.popitem()[1]} without its lora_{missing.pop()}: train or copy it again"
            )
        target, key = _target(module, depth, pairs, outputs, config)
        rank, scale = rank_and_scale(config, key)
        _check_fit(outputs[target], adapter[sides["A"]]["shape"], adapter[sides["B"]]["shape"], rank)
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


def _target(
    module: str,
    depth: int,
    pairs: dict[tuple[str, int], dict[str, str]],
    outputs: dict[str, Output],
    config: dict[str, Any],
) -> tuple[str, str]:
    """Return (parameter's name, the name that PEFT looks up in rank_pattern and alpha_pattern)."""
    targets = tuple(config.get("target_parameters") or ())
    weight = f"{module}.weight"
    if weight in outputs and depth == 0:
        return weight, weight if _is_targeted(weight, targets) else module
    names = (f"{module}.{name}" for name in EXPERT_PARAMETERS)
    wrapped = [name for name in names if name in outputs and _is_targeted(name, targets)]
    num_pairs = sum(other == module for other, _ in pairs)
    if num_pairs != len(wrapped) or depth >= len(wrapped):
        raise ShapeError(
            f"adapter has {num_pairs} LoRA pairs on {module} but the base has {len(wrapped)} targeted parameters there "
            f"({', '.join(wrapped) or 'none'}): adapter and base do not belong together"
        )
    target = wrapped[len(wrapped) - 1 - depth]
    return target, target


def _is_targeted(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check_fit(output: Output, a_shape: list[int], b_shape: list[int], rank: int) -> None:
    if len(output.shape) not in (2, 3) or output.num_experts == 1:
        raise ShapeError(f"adapter targets {output.name} {output.shape}: expected a matrix, or two experts or more")
    experts = output.num_experts or 1
    out_features, in_features = output.shape[-2:] if output.num_experts == 0 else output.shape[:0:-1]
    expected = ([experts * rank, in_features], [out_features, experts * rank])
    if (list(a_shape), list(b_shape)) != expected:
        raise ShapeError(
            f"adapter does not fit {output.name} {output.shape}: A is {a_shape}, B is {b_shape}, expected "
            f"{expected[0]} and {expected[1]}; it was trained on another base"
        )


def _shards(outputs: list[Output], shard_bytes: int) -> tuple[tuple[Output, ...], ...]:
    """Fill shards in order; a parameter larger than a shard gets one of its own.

    Inside a shard wide types come first, as safetensors itself writes them: each tensor stays aligned.
    """
    shards: list[list[Output]] = [[]]
    used = 0
    for output in outputs:
        if shards[-1] and used + output.num_bytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(output)
        used += output.num_bytes
    return tuple(tuple(sorted(shard, key=lambda output: -_width(output))) for shard in shards)


def _width(output: Output) -> int:
    return min(ELEMENT_BYTES[stored.dtype] for stored in output.stored)


def shard_names(count: int) -> list[str]:
    """Return transformers' file names.

    >>> shard_names(1), shard_names(2)[1]
    (['model.safetensors'], 'model-00002-of-00002.safetensors')
    """
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
