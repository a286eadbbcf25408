"""Connections to one model server, kept for the next request.

    Pool.ask(bytes) -> Reply whose head is there

A kept connection that turns out closed is replaced by a fresh one, once, and only when the request can't
have been worked on (wire.StaleConnectionError).

Ring: edge (network).  Units: seconds.
Trap: vLLM's uvicorn closes idle connections after 5 s; ours must give them up earlier, or a request now
      and then meets a connection that is just being closed.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from urllib.parse import urlsplit

from deployments.gateway.wire import Connection, Reply, StaleConnectionError

KEEPALIVE_S = 4.0


class ConnectFailedError(Exception):
    """No connection to the server: it has seen nothing of the request."""


class Pool:
    """The connections to one origin: `http://...`, `https://...`, or `unix:/path/of/a/socket`."""

    def __init__(self, base: str, connect_timeout_s: float) -> None:
        parts = urlsplit(base)
        self._socket = parts.path if parts.scheme == "unix" else None
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._connect_timeout_s = connect_timeout_s
        self._idle: deque[Connection] = deque()  # the latest on the right

    async def ask(self, data: bytes, watch: Callable[[Reply], None] | None = None) -> Reply:
        """Send a request and return its answer once the head is there; `watch` gets it before.

        Raises ConnectFailedError, BrokenReplyError, SilentServerError.
        """
        loop = asyncio.get_running_loop()
        connection = self._take(loop.time())
        while True:
            is_kept = connection is not None
            reply = (connection or await self._connect(loop)).ask(data)
            if watch is not None:
                watch(reply)
            try:
                await reply.start()
            except BaseException as error:  # also a cancelled task: whoever never got the reply can't close it
                reply.close()
                if not is_kept or not isinstance(error, StaleConnectionError):
                    raise
                connection = None
            else:
                return reply

    def _take(self, now: float) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and now - connection.idle_since < KEEPALIVE_S:
                return connection
            if connection.is_open:
                connection.abort()
        return None

    async def _connect(self, loop: asyncio.AbstractEventLoop) -> Connection:
        def make() -> Connection:
            return Connection(self._idle.append, loop)

        try:
            async with asyncio.timeout(self._connect_timeout_s):
                if self._socket is not None:
                    _, connection = await loop.create_unix_connection(make, self._socket)
                else:
                    _, connection = await loop.create_connection(make, self._host, self._port, ssl=self._ssl)
        except (OSError, TimeoutError, ssl.CertificateError) as error:
            raise ConnectFailedError(type(error).__name__) from error
        return connection

    def drop_idle(self, now: float) -> None:
        """Close what was idle for too long."""
        while self._idle and (not self._idle[0].is_open or now - self._idle[0].idle_since >= KEEPALIVE_S):
            connection = self._idle.popleft()
            if connection.is_open:
                connection.abort()

    def close(self) -> None:
        """Close all that is idle."""
        while self._idle:
            self._idle.pop().abort()
