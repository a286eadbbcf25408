"""The direct path: a process beside the gateway that drains its queue all the time.

    gateway -> queue -> `python -m deployments.traces follow` -> Weave, seconds after the answer

The first Lite Gateway sent each trace at once from a task of its own, and lost it when that failed.
Here the same queue, drain and sink as everywhere do it, so nothing is lost or doubled; it is a process,
so that a slow Weave costs the gateway nothing. A scheduled drain beside it does no harm.

Ring: edge (processes).
"""

import logging
import os
import sys

from deployments.gateway.child import Child
from deployments.gateway.settings import Settings
from tasks.errors import SpecError

_RESTART_S = 5.0
_STOP_S = 10.0
logger = logging.getLogger(__name__)


class DirectDrain:
    """Keeps one follower running."""

    def __init__(self, settings: Settings) -> None:
        variables = {**os.environ, "FILE_QUEUE_PATH": str(settings.queue_path.absolute())}
        if settings.redis_url:
            variables["REDIS_URL"] = settings.redis_url
        argv = (sys.executable, "-m", "deployments.traces", "follow")
        self._child = Child("the direct drain", argv, variables, pause_s=_RESTART_S, longest_pause_s=_RESTART_S)
        self.run_forever = self._child.run_forever

    @property
    def is_up(self) -> bool:
        """Is the follower running?"""
        return self._child.is_up

    def check(self) -> None:
        """Raise SpecError when there is no Weave to send to."""
        if not os.environ.get("WANDB_API_KEY") or not os.environ.get("WANDB_ENTITY"):
            raise SpecError(
                "GATEWAY_TRACE_DIRECT=true sends to Weave but WANDB_API_KEY or WANDB_ENTITY is not set: set both, "
                "or unset it and let the flow ingest-traces write W&B offline runs"
            )

    async def stop(self) -> None:
        """Let the follower deliver what waits, for a few seconds; what is left stays in the queue."""
        if not await self._child.stop(_STOP_S):
            logger.warning("Weave is too slow: the rest of the traces stays in the queue")
