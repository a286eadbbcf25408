"""Weave while it answers, W&B offline runs while it is down; each trace in one of the two.

    batch -> was it tried before? -> ask Weave (and the finished offline runs) -> the one that lacks it

Weave is asked once, before the first send of a drain. When it does not answer, this drain writes
offline runs, and those traces never go to Weave by themselves. What may be in Weave already (a send
whose outcome is unknown) waits until Weave says so: in two places it would count twice.

Ring: edge (network, disk).
"""

import logging
from collections.abc import Sequence

from tasks.errors import TransientError
from tasks.traces.queue import QueuedTrace
from tasks.traces.wandb_sink import WandbOfflineSink
from tasks.traces.weave_sink import Delivery, WeaveSink

logger = logging.getLogger(__name__)


class FallbackSink:
    """Two sinks that know of each other; made for one drain."""

    def __init__(self, weave: WeaveSink, offline: WandbOfflineSink) -> None:
        self._weave, self._offline = weave, offline
        self._is_weave_up: bool | None = None

    @property
    def name(self) -> str:
        """The one that takes the traces of this drain."""
        return self._offline.name if self._is_weave_up is False else self._weave.name

    @property
    def batch_records(self) -> int:
        """Large batches for offline runs: each is a run."""
        return self._offline.batch_records if self._is_weave_up is False else self._weave.batch_records

    def deliver(self, items: Sequence[QueuedTrace]) -> Delivery:
        """Settle a batch. Raises TransientError when only Weave knows whether it has it."""
        if self._is_weave_up is None:
            self._is_weave_up = self._weave.is_up()
        tried = {item.record.trace_id for item in items if item.record and item.redelivered}
        there = tried & self._offline.delivered_ids() if tried else set[str]()
        todo = [item for item in items if item.record and item.record.trace_id not in there]
        if self._is_weave_up:
            delivery = self._weave.deliver(todo)
        elif any(item.redelivered for item in todo):
            raise TransientError(
                f"Weave is down and {sum(item.redelivered for item in todo)} traces may be there already: "
                "they and what is behind them wait until it answers"
            )
        else:
            logger.warning("Weave is down: %d traces go to a W&B offline run instead", len(todo))
            delivery = self._offline.deliver(todo)
        delivery.num_already_there += len(items) - len(todo)
        return delivery
