"""The parts of one shard in order: ranges of the base that stay as they are, and pieces that are made.

    base piece -> float32 (+ scale * left @ right) -> one rounding to the stored type, or MXFP4 blocks

A piece is 4 MB, so that three threads rarely wait for each other, and is made in parts of half a megabyte, whose
passes stay in the processor's cache. No tensor is ever held whole; of an MXFP4 base or output it is one expert.

Ring: edge (reads).  Shapes: E experts, I in-features, O out-features, M, N rows and columns as stored.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tasks.errors import CorruptError, ShapeError
from tasks.gptoss.mxfp4 import dequantize_rows, quantize
from tasks.merge.delta import Factors, delta_norm, factors
from tasks.merge.plan import Change, Output, Stored
from tasks.merge.reader import DTYPES, Reader
from tasks.merge.writer import is_finite

_PIECE_VALUES, _CACHED_VALUES = 1 << 21, 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Bytes of a base file that go into the shard as they are: neighbouring tensors of one type."""

    handle: int
    first: int
    size: int
    dtype: str


@dataclass(slots=True, kw_only=True)
class Tally:
    """What was done to one parameter, in sums over its values."""

    norm: float = 0.0  # of the delta
    a_norm: float = 0.0
    b_norm: float = 0.0
    squared_error: float = 0.0  # of requantising
    squared_size: float = 0.0
    kept: float = 0.0  # (merged - base) . delta: what of the delta survives requantising


def shard_parts(
    outputs: tuple[Output, ...], base: Reader, deltas: Reader, tallies: dict[str, Tally]
) -> Iterator[Range | torch.Tensor]:
    """Yield a shard's data in order; `tallies` is filled with one entry for each parameter that is made.

    Raises: CorruptError when a value is not finite, ShapeError when a delta is zero.
    """
    pending: Range | None = None
    for output in outputs:
        if not output.is_copied:
            if pending:
                yield pending
            pending = None
            yield from _made(output, base, deltas, tallies.setdefault(output.name, Tally()))
            continue
        for stored in output.sources:
            handle, first, size = base.place(stored.name)
            here = (handle, first, stored.dtype)
            if pending and (pending.handle, pending.first + pending.size, pending.dtype) == here:
                pending = replace(pending, size=pending.size + size)
                continue
            if pending:
                yield pending
            pending = Range(handle=handle, first=first, size=size, dtype=stored.dtype)
    if pending:
        yield pending


def read_factors(output: Output, change: Change, deltas: Reader) -> Factors:
    """Return the thin matrices of a change. Raises: CorruptError naming the tensor that is not finite."""
    pair = {key: deltas.tensor(key) for key in (change.a_key, change.b_key)}
    for key, values in pair.items():
        if not is_finite(values):
            raise CorruptError(f"adapter tensor {key} holds a value that is not finite: the training diverged")
    return factors(pair[change.a_key], pair[change.b_key], num_experts=output.num_experts)


def _made(output: Output, base: Reader, deltas: Reader, tally: Tally) -> Iterator[torch.Tensor]:
    change = output.change
    pairs = read_factors(output, change, deltas) if change else None
    if change and pairs:
        tally.norm = delta_norm(pairs, scale=change.scale)
        left, right = (sum(float(pair[side].square().sum()) for pair in pairs) ** 0.5 for side in (0, 1))
        tally.a_norm, tally.b_norm = (left, right) if output.num_experts else (right, left)
        if tally.norm == 0.0:
            raise ShapeError(f"the adapter's change of {output.name} is zero: its LoRA B never moved from its start")
    scale = change.scale if change else 1.0
    if pairs and math.frexp(scale)[0] == 0.5:  # a power of two moves no digit: multiply the thin matrix
        pairs, scale = [(left * scale, right) for left, right in pairs], 1.0
    if len(output.stored) == 2:
        yield from _packed(output, base, pairs, scale, tally)
    elif pairs is None and len(output.sources) == 1:
        yield from _converted(output, base)
    else:
        yield from _added(output, base, pairs, scale)


def _converted(output: Output, base: Reader) -> Iterator[torch.Tensor]:
    """Another type, nothing added."""
    source, stored = output.sources[0], output.stored[0]
    count = stored.num_bytes // DTYPES[stored.dtype].itemsize
    for first in range(0, count, _PIECE_VALUES):
        values = base.read(source, first, min(_PIECE_VALUES, count - first))
        piece = values.to(DTYPES[stored.dtype])
        _require_finite(output, piece, values)
        yield piece


def _added(output: Output, base: Reader, pairs: Factors | None, scale: float) -> Iterator[torch.Tensor]:
    """Rows of the parameter, in its own orientation."""
    rows, columns = output.shape[-2:]
    dtype, step = DTYPES[output.stored[0].dtype], max(1, _PIECE_VALUES // columns)
    total, delta = (torch.empty(max(1, min(_CACHED_VALUES // columns, rows)), columns) for _ in range(2))
    for expert in range(output.num_experts or 1):
        unpacked = _unpacked(output, base, expert) if len(output.sources) == 2 else None
        for first in range(0, rows, step):
            count = min(step, rows - first)
            if unpacked is None:
                at = (expert * rows + first) * columns
                values = base.read(output.sources[0], at, count * columns).reshape(count, columns)
            else:
                values = unpacked[:, first : first + count].T
            piece = torch.empty(count, columns, dtype=dtype)
            for row in range(0, count, len(total)):
                part, sums = values[row : row + len(total)], total[: count - row]
                sums.copy_(part)
                if pairs:
                    left, right = pairs[expert]
                    product = torch.mm(left[first + row : first + row + len(sums)], right, out=delta[: len(sums)])
                    sums += product if scale == 1.0 else product.mul_(scale)
                _require_finite(output, sums, part)
                piece[row : row + len(sums)] = sums
            yield piece


def _unpacked(output: Output, base: Reader, expert: int) -> torch.Tensor:
    """Return one expert of an MXFP4 base, (O, I); bfloat16 holds every value exactly."""
    inputs, outputs = output.shape[1:]
    values = torch.empty(outputs, inputs, dtype=torch.bfloat16)
    step = max(1, _PIECE_VALUES // inputs)
    for first in range(0, outputs, step):
        values[first : first + step] = unpacked_rows(output.sources, base, expert, first, min(step, outputs - first))
    return values


def unpacked_rows(pair: tuple[Stored, ...], base: Reader, expert: int, first: int, count: int) -> torch.Tensor:
    """Return `count` out-features of one expert from MXFP4 blocks and scales: (count, I), float32."""
    pieces: list[torch.Tensor] = []
    for source in pair:
        shape = (count, *source.shape[2:])
        row = shape[1] * (shape[2] if len(shape) == 3 else 1)
        at = (expert * source.shape[1] + first) * row
        pieces.append(base.read(source, at, count * row).reshape(shape))
    return dequantize_rows(*pieces)


def _packed(output: Output, base: Reader, pairs: Factors | None, scale: float, tally: Tally) -> Iterator[torch.Tensor]:
    """MXFP4 blocks of the transposed parameter, row after row, then their scales."""
    inputs, outputs = output.shape[1:]
    step, all_scales = max(1, _PIECE_VALUES // 8 // inputs), list[torch.Tensor]()  # quantize has ten such pieces
    for expert in range(output.num_experts):
        plain = None if len(output.sources) == 2 else _plain(output.sources[0], base, expert, inputs, outputs)
        for first in range(0, outputs, step):
            count = min(step, outputs - first)
            if plain is None:
                values = unpacked_rows(output.sources, base, expert, first, count)
            else:
                values = plain[:, first : first + count].T.float().contiguous()
            delta = None
            if pairs:
                left, right = pairs[expert]
                delta = torch.mm(right[:, first : first + count].T, left.T).mul_(scale)
            merged = values if delta is None else values + delta
            _require_finite(output, merged, values)
            blocks, scales = quantize(merged)
            stored = dequantize_rows(blocks, scales)
            tally.squared_size += float(merged.square().sum())
            tally.squared_error += float((stored - merged).square().sum())
            if delta is not None:
                tally.kept += float((stored - values).mul_(delta).sum())
            all_scales.append(scales)
            yield blocks.contiguous()
    yield torch.cat(all_scales)


def _plain(source: Stored, base: Reader, expert: int, rows: int, columns: int) -> torch.Tensor:
    return base.read(source, expert * rows * columns, rows * columns).reshape(rows, columns)


def _require_finite(output: Output, merged: torch.Tensor, values: torch.Tensor) -> None:
    if is_finite(merged):
        return
    if not is_finite(values):
        raise CorruptError(f"base tensor {output.sources[0].name} holds a value that is not finite: download it again")
    raise CorruptError(
        f"merging {output.name} gives values that are not finite: the adapter's change of it is too large"
    )
