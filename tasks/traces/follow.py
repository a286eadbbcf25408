"""Drain all the time: what the gateway's direct path runs beside it.

    follow(): drain, rest a moment, drain again ... until told to stop

The same queue, drain and sink as the scheduled flow; while Weave is away it tries less often, and a
drain elsewhere makes it wait for its turn.

Ring: edge (queue and sink).  Units: seconds.
"""

import logging
from collections.abc import Callable

import redis

from tasks.errors import TataraError, is_transient
from tasks.traces.queue import TraceQueue
from tasks.traces.run import Sink, drain_traces
from tasks.traces.spec import DrainSpec

PAUSE_S = 0.5
MAX_PAUSE_S = 60.0
logger = logging.getLogger(__name__)


def follow(open_queue: Callable[[], TraceQueue], sink: Sink, spec: DrainSpec, wait: Callable[[float], bool]) -> None:
    """Drain until `wait(seconds)` returns True, and once more then.

    Raises nothing for the world's sake: an error is logged, and the pause before the next try doubles.
    """
    pause_s, is_last = PAUSE_S, False
    queue: TraceQueue | None = None
    while True:
        try:
            queue = queue or open_queue()
            drain_traces(queue, sink, spec)
            pause_s = PAUSE_S
        except (TataraError, OSError, redis.RedisError) as error:
            pause_s = min(MAX_PAUSE_S, pause_s * 2 if is_transient(error) else MAX_PAUSE_S)
            logger.warning("the direct drain failed, next try in %.0f s: %s", pause_s, error)
        if is_last:
            return
        is_last = wait(pause_s)
