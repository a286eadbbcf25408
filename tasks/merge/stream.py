"""The parts of one shard in order: ranges of the base that stay as they are, and pieces that are made.

    base piece -> float32 (+ scale * left @ right) -> one rounding to the stored type, or MXFP4 blocks

Pieces are independent: `writer.py` lets several threads make them. One is 2 MB, so that threads rarely wait for each
other, and is made in parts whose passes stay in the processor's cache. No tensor is ever held whole; of an MXFP4
base or output a piece is one expert.

Ring: edge (reads).  Shapes: E experts, I in-features, O out-features, M, N rows and columns as stored.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from tasks.errors import CorruptError, ShapeError
from tasks.gptoss.mxfp4 import dequantize_rows, quantize
from tasks.merge.delta import Factors, delta_norm, factors
from tasks.merge.plan import Change, Output, Stored
from tasks.merge.reader import DTYPES, Buffers, Reader, is_finite

_PIECE_VALUES, _CACHED_VALUES = 1 << 20, 1 << 18
BUFFER_BYTES = 4 * _PIECE_VALUES


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Bytes of a base file that go into the shard as they are: neighbouring tensors of one type."""

    handle: int
    first: int
    size: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Piece:
    """The next bytes, still to be made: in any thread, but a `last` one only when all before it are."""

    make: Callable[[], torch.Tensor]
    num_bytes: int
    is_last: bool = False


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
    outputs: tuple[Output, ...], base: Reader, deltas: Reader, tallies: dict[str, Tally], buffers: Buffers
) -> Iterator[Range | Piece]:
    """Yield a shard's data in order; `tallies` is filled with one entry for each parameter that is made.

    Pieces are taken from `buffers`: whoever has written one may give it back.

    Raises: CorruptError when a value is not finite, ShapeError when a delta is zero.
    """
    pending: Range | None = None
    for output in outputs:
        if not output.is_copied:
            if pending:
                yield pending
            pending = None
            yield from _made(output, base, deltas, tallies.setdefault(output.name, Tally()), buffers)
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


def _made(output: Output, base: Reader, deltas: Reader, tally: Tally, buffers: Buffers) -> Iterator[Piece]:
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
        yield from _converted(output, base, buffers)
    else:
        yield from _added(output, base, pairs, scale, buffers)


def _converted(output: Output, base: Reader, buffers: Buffers) -> Iterator[Piece]:
    """Another type, nothing added."""
    source, stored = output.sources[0], output.stored[0]
    dtype = DTYPES[stored.dtype]
    num_values = stored.num_bytes // dtype.itemsize

    def make(first: int, count: int) -> torch.Tensor:
        values = base.read(source, first, count, buffers)
        piece = buffers.take(count, dtype).copy_(values)
        _require_finite(output, piece, values)
        buffers.give(values)
        return piece

    for first in range(0, num_values, _PIECE_VALUES):
        count = min(_PIECE_VALUES, num_values - first)
        yield Piece(partial(make, first, count), count * dtype.itemsize)


def _added(output: Output, base: Reader, pairs: Factors | None, scale: float, buffers: Buffers) -> Iterator[Piece]:
    """Rows of the parameter, in its own orientation."""
    rows, columns = output.shape[-2:]
    dtype, is_packed = DTYPES[output.stored[0].dtype], len(output.sources) == 2
    step = rows if is_packed else max(1, _PIECE_VALUES // columns)  # MXFP4 lies transposed: an expert is read whole

    def make(expert: int, first: int, count: int) -> torch.Tensor:
        if is_packed:
            values = _unpacked(output, base, expert).T
        else:
            at = (expert * rows + first) * columns
            values = base.read(output.sources[0], at, count * columns, buffers).reshape(count, columns)
        thin = (pairs[expert][0][first : first + count], pairs[expert][1]) if pairs else None
        if values.dtype == dtype and not is_packed:
            return _add(output, values, thin, scale, values, buffers)
        piece = _add(output, values, thin, scale, buffers.take(count * columns, dtype).reshape(count, columns), buffers)
        buffers.give(values)
        return piece

    for expert in range(output.num_experts or 1):
        for first in range(0, rows, step):
            count = min(step, rows - first)
            yield Piece(partial(make, expert, first, count), count * columns * dtype.itemsize)


def _add(
    output: Output,
    values_MN: torch.Tensor,
    thin: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float,
    piece_MN: torch.Tensor,
    buffers: Buffers,
) -> torch.Tensor:
    """Return values + scale * left @ right, added in float32 and rounded once into `piece_MN` (may be the values)."""
    rows, columns = values_MN.shape
    height = max(1, min(_CACHED_VALUES // columns, rows))
    total = buffers.take(height * columns, torch.float32).reshape(height, columns)
    for row in range(0, rows, height):
        part, sums = values_MN[row : row + height], total[: rows - row]
        sums.copy_(part)
        if thin:
            left, right = thin[0][row : row + height], thin[1]
            if scale == 1.0:
                sums.addmm_(left, right)
            else:
                sums += torch.mm(left, right).mul_(scale)  # as PEFT does: the product is rounded, then scaled
        _require_finite(output, sums, part)
        piece_MN[row : row + height] = sums
    buffers.give(total)
    return piece_MN


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


def _packed(output: Output, base: Reader, pairs: Factors | None, scale: float, tally: Tally) -> Iterator[Piece]:
    """MXFP4 blocks of the transposed parameter, expert after expert, then their scales."""
    inputs, outputs = output.shape[1:]
    step = max(1, _PIECE_VALUES // 8 // inputs)  # quantize has ten such parts
    all_scales = [torch.empty(0)] * output.num_experts
    tallies = [Tally() for _ in all_scales]

    def make(expert: int) -> torch.Tensor:
        plain = None if len(output.sources) == 2 else _plain(output.sources[0], base, expert, inputs, outputs)
        made: list[tuple[torch.Tensor, torch.Tensor]] = []
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
            made.append(_quantized(output, values, delta, tallies[expert]))
        all_scales[expert] = torch.cat([scales for _, scales in made])
        return torch.cat([blocks for blocks, _ in made])

    def end() -> torch.Tensor:
        for name in ("squared_error", "squared_size", "kept"):  # always in the same order: sums of floats
            setattr(tally, name, sum(getattr(each, name) for each in tallies))
        return torch.cat(all_scales)

    for expert in range(output.num_experts):
        yield Piece(partial(make, expert), inputs * outputs // 2)
    yield Piece(end, output.stored[1].num_bytes, is_last=True)


def _quantized(
    output: Output, values: torch.Tensor, delta: torch.Tensor | None, tally: Tally
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (blocks, scales) of some rows, and add up what the rounding costs."""
    merged = values if delta is None else values + delta
    _require_finite(output, merged, values)
    blocks, scales = quantize(merged)
    stored = dequantize_rows(blocks, scales)
    tally.squared_size += float(merged.square().sum())
    tally.squared_error += float((stored - merged).square().sum())
    if delta is not None:
        tally.kept += float((stored - values).mul_(delta).sum())
    return blocks, scales


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
