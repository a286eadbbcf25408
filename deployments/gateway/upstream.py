"""A model server behind the gateway, and whether it is there.

    Upstream.open() -> aiohttp response, its body not read yet

The circuit: the first request that can't reach the server opens it; from then on requests don't try,
and `watch` probes about once a second until the server is back. A slow or failing answer does not
open it: only a server that can't be reached is down.

Ring: edge (network).
Trap: vLLM's uvicorn closes idle connections after 5 s; ours must give them up earlier, or a request
      now and then meets a connection that is just being closed.
"""

import asyncio
import logging
import time
from collections.abc import Mapping

import aiohttp

from deployments.gateway.settings import Settings

KEEPALIVE_S = 4.0
_PROBE_TIMEOUT_S = 2.0
_FRESH_S = 1.0
logger = logging.getLogger(__name__)


class UpstreamDownError(Exception):
    """The server can't be reached; the request was not answered by it."""


class UpstreamTimeoutError(Exception):
    """The server took the request and then said nothing for too long."""


def open_session(settings: Settings) -> aiohttp.ClientSession:
    """Make the one HTTP client; its limits on connections are the server's."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=settings.connect_timeout_s, sock_read=settings.read_timeout_s
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
    )


class Upstream:
    """One OpenAI-compatible server."""

    def __init__(self, name: str, base: str, session: aiohttp.ClientSession, probe_interval_s: float) -> None:
        self.name = name
        self.first_model: str | None = None
        self._base = base
        self._session = session
        self._interval_s = probe_interval_s
        self._down = asyncio.Event()
        self._probed_at = 0.0
        self._probing = asyncio.Lock()

    @property
    def is_down(self) -> bool:
        """Whether the circuit is open: don't even try."""
        return self._down.is_set()

    async def open(
        self, path: str, body: bytes | None, headers: Mapping[str, str], method: str = "POST"
    ) -> aiohttp.ClientResponse:
        """Send a request and return its answer as soon as the headers are there. The caller closes it.

        Raises UpstreamDownError before anything was answered, UpstreamTimeoutError after a silence.
        """
        try:
            return await self._session.request(
                method, self._base + path, data=body, headers=headers, allow_redirects=False
            )
        except aiohttp.SocketTimeoutError as error:
            raise UpstreamTimeoutError(self.name) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._note_down(type(error).__name__)
            raise UpstreamDownError(self.name) from error

    async def is_healthy(self) -> bool:
        """Ask the server, at most once a second."""
        async with self._probing:
            if time.monotonic() - self._probed_at >= _FRESH_S:
                await self._probe()
        return not self.is_down

    async def watch(self) -> None:
        """Probe a server that is down until it is back; runs as long as the gateway."""
        while True:
            await self._down.wait()
            async with self._probing:
                await self._probe()
            if self.is_down:
                await asyncio.sleep(self._interval_s)

    async def _probe(self) -> None:
        """Ask /health: any answer but a 5xx means that a server is there, whoever made it."""
        timeout = aiohttp.ClientTimeout(total=_PROBE_TIMEOUT_S)
        try:
            async with self._session.get(f"{self._base}/health", timeout=timeout, allow_redirects=False) as reply:
                alive = reply.status < 500
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._note_down(type(error).__name__)
        else:
            self._note_up() if alive else self._note_down(f"status {reply.status}")
        self._probed_at = time.monotonic()

    async def pick_model(self, headers: Mapping[str, str]) -> str | None:
        """Return the first model that the server lists; asked once. Raises UpstreamDownError."""
        if self.first_model is None:
            reply = await self.open("/v1/models", None, headers, method="GET")
            try:
                listed = await reply.json(content_type=None)
                self.first_model = str(listed["data"][0]["id"])
            except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError):
                logger.warning("%s does not list its models: set LITE_MODEL_NAME", self.name)
            finally:
                reply.close()
        return self.first_model

    def _note_down(self, why: str) -> None:
        if not self._down.is_set():
            logger.warning("%s is down (%s): probing every %.1f s", self.name, why, self._interval_s)
            self._down.set()

    def _note_up(self) -> None:
        if self._down.is_set():
            logger.info("%s is up again", self.name)
            self._down.clear()
