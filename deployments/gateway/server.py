"""uvicorn's server, for connections with time limits of their own (line.py) and a stop that a load balancer sees.

Ring: edge (network).  Units: seconds.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import uvicorn

from deployments.gateway.line import ClientConnection


class Server(uvicorn.Server):
    """uvicorn's server; closes silent connections, and can say "not ready" before it stops listening."""

    def __init__(self, config: uvicorn.Config, drain_delay_s: float, on_drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain_delay_s = drain_delay_s
        self._on_drain = on_drain
        self._stop_at: float | None = None

    def handle_exit(self, sig: int, frame: Any) -> None:  # Any: as in uvicorn
        """First signal: drain. Second: stop at once."""
        self._on_drain()
        if self._stop_at is None and self._drain_delay_s and self.started:
            self._captured_signals.append(sig)
            self._stop_at = asyncio.get_running_loop().time() + self._drain_delay_s
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Every 0.1 s, see uvicorn."""
        now = asyncio.get_running_loop().time()
        if counter % 10 == 0:
            for connection in list(self.server_state.connections):
                if isinstance(connection, ClientConnection):
                    connection.close_if_slow(now)
        if self._stop_at is not None and now >= self._stop_at:
            self.should_exit = True
        return await super().on_tick(counter)
