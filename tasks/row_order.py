"""Which rows of the data set each optimizer step learns, without reading them.

    the trainer's data loader -> RowOrder.rows(step) -> [row ids]

accelerate shuffles each epoch with the seed `initial_seed + epoch`, so the order is known for any step: an error can
name the rows of its batch, and the tokens learnt so far need no counter that a resume would reset.

Ring: edge (accelerate).
"""

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from accelerate.data_loader import get_sampler


class RowOrder:
    """The order of rows over a run; the same on every rank."""

    def __init__(self, loader: Any, *, rows_per_step: int, accumulation: int) -> None:  # Any: accelerate's shards
        self._sampler: Any = get_sampler(loader)  # Any: torch or accelerate
        self._rows_per_step = rows_per_step
        self._steps_per_epoch = max(1, -(-len(loader) // accumulation))
        self._epoch = lru_cache(maxsize=2)(self._draw)

    def rows(self, step: int) -> list[int]:
        """Return the rows of optimizer step `step` (the first is 1), over all ranks and accumulated batches."""
        epoch, place = divmod(step - 1, self._steps_per_epoch)
        start = place * self._rows_per_step
        return self._epoch(epoch)[start : start + self._rows_per_step]

    def total(self, until: int, weigh: Callable[[int], int], *, since: int = 0) -> int:
        """Return the sum of `weigh(row)` over the steps after `since` up to `until`."""
        return sum(weigh(row) for step in range(since + 1, until + 1) for row in self.rows(step))

    def _draw(self, epoch: int) -> list[int]:
        sampler = copy.copy(self._sampler)
        sampler.generator = None  # a generator of its own: the run's is not to be moved
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        return list(sampler)
