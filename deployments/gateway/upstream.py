"""The model servers behind the gateway, whether they are there, and which one is asked next.

    Fleet.order() -> [Upstream, ...] -> Upstream.ask() -> wire.Reply

The circuit of each: the first request that can't reach the server opens it; from then on requests don't
try, and `watch` probes about once a second until the server is back. A slow or failing answer does not
open it: only a server that can't be reached is down.

Ring: edge (network).  Units: seconds.
"""

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from deployments.gateway.pool import ConnectFailedError, Pool
from deployments.gateway.settings import Settings, Weighted
from deployments.gateway.traffic import Target
from deployments.gateway.wire import BrokenReplyError, Reply, SilentServerError

Ids = tuple[str, str, str]  # digest of the model, of its adapter, id of the run that serves it
NO_IDS: Ids = ("", "", "")
ID_HEADERS = (b"x-tatara-model-digest", b"x-tatara-adapter-digest", b"x-tatara-run-id")
_PROBE_TIMEOUT_S = 2.0
_FRESH_S = 1.0
_UNREACHABLE = (ConnectFailedError, BrokenReplyError, SilentServerError, TimeoutError)
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Counts:
    """What became of the requests of one server since it was known here. Seconds are those of answers."""

    answered: int = 0
    failed: int = 0
    seconds: float = 0.0

    def note(self, status: int, seconds: float, *, failed: bool) -> None:
        """Count one request; what the gateway or the server refused for the client's fault is no sign of the server."""
        if failed or status in (502, 504):
            self.failed += 1
        elif status < 400:
            self.answered += 1
            self.seconds += seconds


class Upstream:
    """One OpenAI-compatible server."""

    def __init__(
        self,
        name: str,
        base: str,
        settings: Settings,
        *,
        key: str = "",
        weight: float = 1.0,
        is_lite: bool = False,
        ids: Ids = NO_IDS,
    ) -> None:
        parts = urlsplit(base)
        self.name = name
        self.base = base
        self.weight = weight
        self.has_key = bool(key)
        self.is_lite = is_lite
        self.places = 0  # most requests at once; 0: as many as come
        self.num_running = 0
        self.counts = Counts()
        self.ids = ids
        self.id_headers = [(name, value.encode()) for name, value in zip(ID_HEADERS, ids, strict=True) if value]
        self.first_model: str | None = None
        self.pool = Pool(base, settings.connect_timeout_s)
        is_socket = parts.scheme == "unix"
        self._prefix = "" if is_socket else parts.path
        own = f"authorization: Bearer {key}\r\n" if key else ""
        self._fixed = (
            f"host: {'localhost' if is_socket else parts.netloc}\r\naccept-encoding: identity\r\n{own}".encode()
        )
        self._heads: dict[str, bytes] = {}
        self._interval_s = settings.probe_interval_s
        self._down = asyncio.Event()
        self._is_loading = False
        self._probed_at = 0.0
        self._probing = asyncio.Lock()

    @property
    def is_down(self) -> bool:
        """Whether the circuit is open: don't even try."""
        return self._down.is_set()

    @property
    def state(self) -> str:
        """`up`, `down`, or `loading`: a process of ours that has not answered yet."""
        if not self.is_down:
            return "up"
        return "loading" if self._is_loading else "down"

    @property
    def is_full(self) -> bool:
        """Whether it has all the requests that it takes."""
        return 0 < self.places <= self.num_running

    def post(self, path: str, headers: bytes, body: bytes) -> bytes:
        """Put a request together; `headers` are whole lines."""
        head = self._heads.get(path)
        if head is None:
            line = f"POST {self._prefix}{path} HTTP/1.1\r\n".encode()
            head = self._heads[path] = line + self._fixed + b"content-type: application/json\r\n"
        return b"%b%bcontent-length: %d\r\n\r\n%b" % (head, headers, len(body), body)

    async def ask(self, data: bytes, watch: Callable[[Reply], None] | None = None) -> Reply:
        """Send a request; return its answer when the head is there. The caller closes it.

        Raises ConnectFailedError (it has seen nothing), BrokenReplyError (it may have), SilentServerError.
        """
        try:
            return await self.pool.ask(data, watch)
        except (ConnectFailedError, BrokenReplyError) as error:
            self.note_down(str(error))
            raise

    async def get(self, path: str, headers: bytes = b"", timeout_s: float = _PROBE_TIMEOUT_S) -> tuple[Reply, bytes]:
        """GET a small thing whole. Raises one of UNREACHABLE."""
        data = f"GET {self._prefix}{path} HTTP/1.1\r\n".encode() + self._fixed + headers + b"\r\n"
        async with asyncio.timeout(timeout_s):
            reply = await self.pool.ask(data)
            try:
                return reply, await reply.read()
            finally:
                reply.close()

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
        try:
            reply, _ = await self.get("/health")
        except _UNREACHABLE as error:
            self.note_down(str(error) or type(error).__name__)
        else:
            self._note_up() if reply.status < 500 else self.note_down(f"status {reply.status}")
        self._probed_at = time.monotonic()

    async def pick_model(self) -> str | None:
        """Return the first model that the server lists; asked once. Raises ConnectFailedError."""
        if self.first_model is None:
            try:
                _, data = await self.get("/v1/models")
                self.first_model = str(json.loads(data)["data"][0]["id"])
            except _UNREACHABLE as error:
                self.note_down(str(error) or type(error).__name__)
                raise ConnectFailedError("no list of models") from error
            except (ValueError, LookupError, TypeError):
                logger.warning("%s does not list its models: set LITE_MODEL_NAME", self.name)
        return self.first_model

    def note_loading(self) -> None:
        """Note that its process was started: not there yet, and nothing to warn of."""
        self._is_loading = True
        self._down.set()

    def note_ended(self) -> None:
        """Note that its process is gone."""
        self._is_loading = False
        self.note_down("its process ended")

    def note_down(self, why: str) -> None:
        """Open the circuit."""
        if self._is_loading:
            return
        if not self._down.is_set():
            logger.warning("%s is down (%s): probing every %.1f s", self.name, why, self._interval_s)
            self._down.set()

    def _note_up(self) -> None:
        if self._down.is_set():
            logger.info("%s is up%s", self.name, "" if self._is_loading else " again")
            self._is_loading = False
            self._down.clear()


class Fleet:
    """The servers of each route: of `vllm` there may be several, with weights; `own_lite` are processes of ours."""

    def __init__(self, settings: Settings, own_lite: Sequence[Upstream] = ()) -> None:
        self._settings = settings
        servers = settings.vllm_url
        names = ["vllm"] if len(servers) == 1 else [f"vllm-{number}" for number in range(1, len(servers) + 1)]
        self.routes: Mapping[str, Sequence[Upstream]] = {
            "vllm": [_server(name, server, settings) for name, server in zip(names, servers, strict=True)]
        }
        self.leaving: list[Upstream] = []  # they get no new requests; those that run end there
        if own_lite:
            self.routes = {**self.routes, "lite": own_lite}
        elif settings.lite_model:
            lite = Upstream("lite", settings.lite_model, settings, key=settings.lite_api_key, is_lite=True)
            self.routes = {**self.routes, "lite": [lite]}

    def apply(self, targets: Sequence[Target]) -> list[Upstream]:
        """Send new requests to these servers, by their weights; return those that were not known before.

        A server that goes on keeps its connections, circuit and counts. One that is left out answers what it has.
        """
        known = {(each.name, each.base, each.ids): each for each in (*self.routes["vllm"], *self.leaving)}
        wanted = [known.get(target.identity) or _target(target, self._settings) for target in targets]
        for upstream, target in zip(wanted, targets, strict=True):
            upstream.weight = target.weight
        self.routes = {**self.routes, "vllm": wanted}
        self.leaving = [each for each in known.values() if each not in wanted and each.num_running > 0]
        for each in known.values():
            if each not in wanted:
                each.pool.close()
        return [each for each in wanted if each not in known.values()]

    @property
    def all(self) -> list[Upstream]:
        """Every server."""
        return [upstream for servers in self.routes.values() for upstream in servers]

    def order(self, route: str) -> Sequence[Upstream]:
        """Return the servers of a route that are up, in the order in which to try them."""
        servers = self.routes.get(route, ())
        if len(servers) == 1:
            return () if servers[0].is_down or servers[0].is_full else servers
        there = [server for server in servers if not server.is_down and not server.is_full]
        return order_by_load(there, random.random())  # noqa: S311 - no secret

    def why_not_lite(self) -> str:
        """Say why the lite model was passed over, for the header and the trace."""
        states = {"busy" if server.is_full else server.state for server in self.routes.get("lite", ())}
        return next((f"lite-{state}" for state in ("busy", "loading") if state in states), "lite-down")

    async def health(self) -> dict[str, bool]:
        """Ask all servers; a route is healthy when one of its servers is, and several are listed one by one too."""
        asked, everyone = self.routes, self.all  # `apply` may change both while they answer
        alive = dict(zip(everyone, await asyncio.gather(*(server.is_healthy() for server in everyone)), strict=True))
        routes = {route: any(alive[server] for server in servers) for route, servers in asked.items()}
        return routes | {server.name: up for server, up in alive.items()}

    def close(self) -> None:
        """Close all idle connections."""
        for upstream in self.all:
            upstream.pool.close()


def _server(name: str, server: Weighted, settings: Settings) -> Upstream:
    ids = (settings.model_digest, settings.adapter_digest, settings.run_id)
    return Upstream(name, server.url, settings, key=settings.vllm_api_key, weight=server.weight, ids=ids)


def _target(target: Target, settings: Settings) -> Upstream:
    return Upstream(target.name, target.url, settings, key=settings.vllm_api_key, weight=target.weight, ids=target.ids)


def order_by_load(servers: Sequence[Upstream], draw: float) -> list[Upstream]:
    """Draw a weight by its share, then take the least loaded server of that weight; the others come after it.

    So `a=95,b=5` is a canary, and servers of equal weight share their part by load. `draw` is in 0..1.
    """
    shares: dict[float, float] = {}
    for server in servers:
        shares[server.weight] = shares.get(server.weight, 0.0) + server.weight
    left = draw * sum(shares.values())
    drawn = 0.0
    for weight, share in shares.items():
        drawn = weight
        left -= share
        if left < 0:
            break
    return sorted(servers, key=lambda server: (server.weight != drawn, server.num_running / server.weight))
