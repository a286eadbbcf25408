"""The direct path: a process beside the gateway that drains its queue all the time.

    gateway -> queue -> `python -m deployments.traces follow` -> Weave, seconds after the answer

The first Lite Gateway sent each trace at once from a task of its own, and lost it when that failed.
Here the same queue, drain and sink as everywhere do it, so nothing is lost or doubled; it is a process,
so that a slow Weave costs the gateway nothing. It ends with the gateway, also when that is killed: its
standard input is a pipe that then closes. A scheduled drain beside it does no harm.

Ring: edge (processes).
"""

import asyncio
import logging
import os
import sys

from deployments.gateway.settings import Settings
from tasks.errors import SpecError

_RESTART_S = 5.0
_STOP_S = 10.0
logger = logging.getLogger(__name__)


class DirectDrain:
    """Keeps one follower running."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None

    @property
    def is_up(self) -> bool:
        """Is the follower running?"""
        return self._process is not None and self._process.returncode is None

    def check(self) -> None:
        """Raise SpecError when there is no Weave to send to."""
        if not os.environ.get("WANDB_API_KEY") or not os.environ.get("WANDB_ENTITY"):
            raise SpecError(
                "GATEWAY_TRACE_DIRECT=true sends to Weave but WANDB_API_KEY or WANDB_ENTITY is not set: set both, "
                "or unset it and let the flow ingest-traces write W&B offline runs"
            )

    async def run_forever(self) -> None:
        """Start the follower, and start it again when it ends."""
        while True:
            variables = {**os.environ, "FILE_QUEUE_PATH": str(self._settings.queue_path.absolute())}
            if self._settings.redis_url:
                variables["REDIS_URL"] = self._settings.redis_url
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "deployments.traces", "follow"),
                env=variables,
                stdin=asyncio.subprocess.PIPE,
            )
            status = await self._process.wait()
            logger.warning("the direct drain ended with status %s: starting it again in %g s", status, _RESTART_S)
            await asyncio.sleep(_RESTART_S)

    async def stop(self) -> None:
        """Let the follower deliver what waits, for a few seconds; what is left stays in the queue."""
        if self._process is None or self._process.returncode is not None or self._process.stdin is None:
            return
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_S)
        except TimeoutError:
            logger.warning("Weave is too slow: the rest of the traces stays in the queue")
            self._process.kill()
            await self._process.wait()
