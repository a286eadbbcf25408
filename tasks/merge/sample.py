"""Which blocks of a changed parameter are compared with PEFT's own delta, and whether they agree.

Two experts and a block of 64 rows and columns of each: chosen by the parameter's name, so that every merge of
every model looks at others, and the merge and PEFT's side choose alike without a word.

Ring: pure.  Shapes: S sampled experts, M rows and N columns of the block.
"""

from dataclasses import dataclass
from hashlib import sha256

import torch

from tasks.errors import ShapeError
from tasks.merge.delta import Factors

_BLOCK = 64
_TOLERANCE = 1e-5  # of the norm; float32 sums in another order differ by 1e-7


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A block of one parameter as it is stored; `experts` is empty for a matrix."""

    experts: tuple[int, ...]
    rows: slice
    columns: slice


def choose_sample(name: str, shape: tuple[int, ...]) -> Sample:
    """Return the block of a parameter that is compared.

    >>> choose_sample("a.weight", (64, 32)), choose_sample("b", (2, 32, 32)).experts
    (Sample(experts=(), rows=slice(0, 64, None), columns=slice(0, 32, None)), (0, 1))
    """
    digest = sha256(name.encode()).digest()
    numbers = [int.from_bytes(digest[start : start + 4], "big") for start in range(0, 16, 4)]
    experts: tuple[int, ...] = ()
    if len(shape) == 3:
        first = numbers[0] % shape[0]
        experts = tuple(sorted({first, (first + 1 + numbers[1] % (shape[0] - 1)) % shape[0]}))
    rows, columns = (_span(number, size) for number, size in zip(numbers[2:], shape[-2:], strict=True))
    return Sample(experts=experts, rows=rows, columns=columns)


def _span(number: int, size: int) -> slice:
    start = number % (max(0, size - _BLOCK) + 1) // 32 * 32  # whole MXFP4 blocks
    return slice(start, min(start + _BLOCK, size))


def sampled_delta(pairs: Factors, scale: float, sample: Sample) -> torch.Tensor:
    """Return our delta of the block: (S, M, N), or (M, N) of a matrix."""
    blocks = [pairs[e][0][sample.rows] @ pairs[e][1][:, sample.columns] * scale for e in sample.experts or (0,)]
    return torch.stack(blocks) if sample.experts else blocks[0]


def compare_delta(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return how far our delta is from PEFT's, as a share of its norm.

    Raises: ShapeError when it is more than rounding.

    >>> compare_delta("w", torch.ones(2, 2), torch.ones(2, 2))
    0.0
    """
    if ours.shape != theirs.shape:
        raise ShapeError(
            f"PEFT's delta of {name} has shape {tuple(theirs.shape)}, ours {tuple(ours.shape)}: {_WAY_OUT}"
        )
    gap = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
    if not gap <= _TOLERANCE:
        raise ShapeError(f"our delta of {name} is not PEFT's: they differ by {gap:.2g} of its norm; {_WAY_OUT}")
    return gap


_WAY_OUT = "this PEFT stores adapters in another way, merge with PEFT's merge_and_unload and report it"
