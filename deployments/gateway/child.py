"""A process beside the gateway that lives no longer than it does.

    Child.run_forever() -> started, started again when it ends, ever later
    Child.stop()        -> its standard input is closed: it ends; killed when it does not

The child's standard input is a pipe from the gateway. It closes when the gateway ends, also by SIGKILL, and
the child ends with it: no orphan. (tasks/processes.py is for the opposite: children that outlive their parent.)

Ring: edge (processes).  Units: seconds.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

_STEADY_S = 60.0  # whoever lived so long did not fail at its start
logger = logging.getLogger(__name__)


class Child:
    """Keeps one process running. The first pause before a new start doubles up to `longest_pause_s`."""

    def __init__(
        self, name: str, argv: Sequence[str], variables: Mapping[str, str], *, pause_s: float, longest_pause_s: float
    ) -> None:
        self.num_restarts = 0
        self.on_start: Callable[[], None] = lambda: None
        self.on_end: Callable[[], None] = lambda: None
        self._name = name
        self._argv, self._variables = tuple(argv), dict(variables)
        self._pause_s, self._longest_pause_s = pause_s, longest_pause_s
        self._process: asyncio.subprocess.Process | None = None

    @property
    def is_up(self) -> bool:
        """Is the process running?"""
        return self._process is not None and self._process.returncode is None

    async def run_forever(self) -> None:
        """Start it, and start it again when it ends."""
        loop, pause_s = asyncio.get_running_loop(), self._pause_s
        while True:
            began = loop.time()
            self._process = await asyncio.create_subprocess_exec(
                *self._argv,
                env=self._variables,
                stdin=asyncio.subprocess.PIPE,
                start_new_session=True,  # a Ctrl-C is for the gateway, which ends its children in order
            )
            self.on_start()
            status = await self._process.wait()
            self.on_end()
            if loop.time() - began >= _STEADY_S:
                pause_s = self._pause_s
            logger.warning("%s ended with status %s: starting it again in %g s", self._name, status, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, self._longest_pause_s)
            self.num_restarts += 1

    async def stop(self, grace_s: float) -> bool:
        """End it; False when it had to be killed."""
        if self._process is None or self._process.returncode is not None or self._process.stdin is None:
            return True
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), grace_s)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
            return False
        return True
