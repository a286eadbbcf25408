"""One trace per request, written before the client sees the end of its answer.

    Recording.finish() -> TraceRecord -> one O_APPEND write to the trace file -> (Redis, when set)

A trace is in the file before the last byte of its answer is sent, so a SIGKILL of the gateway loses
no trace of a request that was answered; what a power cut may cost is GATEWAY_TRACE_FSYNC_MS. The
write takes microseconds and is the only thing on the request's path: with REDIS_URL a background
task ships the file to the stream, and while Redis is away the file grows.

Ring: edge (disk, network).
"""

import asyncio
import logging
import random
import threading
import time
from typing import Any

from deployments.gateway.routing import Choice, Json
from deployments.gateway.settings import Settings
from tasks.errors import SpecError, TataraError
from tasks.traces.queue import FileQueue
from tasks.traces.record import Status, TraceRecord, iso_from_us, usage_of, uuid7, without_secrets
from tasks.traces.segments import SegmentWriter, sync_and_close

_SHIP_PAUSE_S = 0.1
_SHIP_RETRY_S = 1.0
_LAST_SHIP_S = 5.0
logger = logging.getLogger(__name__)


class Recording:
    """What is known of one request so far; `finish` writes it, once."""

    __slots__ = (
        "_mono_ns",
        "_recorder",
        "choice",
        "endpoint",
        "finished",
        "first_us",
        "request",
        "started_us",
        "trace_id",
    )

    def __init__(self, recorder: "Recorder", endpoint: str) -> None:
        self._recorder = recorder
        self.endpoint = endpoint
        self.started_us = time.time_ns() // 1000
        self._mono_ns = time.monotonic_ns()
        self.trace_id = uuid7(self.started_us, random.getrandbits(62))
        self.first_us: int | None = None
        self.request: Json | None = None
        self.choice = Choice(route="none", reason="bad-request")
        self.finished = False

    def note_first(self) -> None:
        """Note that the first piece of the answer is here."""
        if self.first_us is None:
            self.first_us = self._now_us()

    def finish(
        self,
        status: Status,
        http_status: int,
        response: Json | None = None,
        *,
        error: str | None = None,
        stream: Json | None = None,
    ) -> None:
        """Write the trace. A second call is ignored: the first outcome is the one that counts."""
        if self.finished:
            return
        self.finished = True
        self._recorder.write(
            TraceRecord(
                trace_id=self.trace_id,
                started_at=iso_from_us(self.started_us),
                first_token_at=iso_from_us(self.first_us) if self.first_us else None,
                ended_at=iso_from_us(self._now_us()),
                endpoint=self.endpoint,
                route=self.choice.route,
                reason=self.choice.reason,
                model=_model_of(response, self.request),
                status=status,
                http_status=http_status,
                streamed=stream is not None,
                request=without_secrets(self.request) if self.request is not None else None,
                response=response,
                usage=usage_of(response),
                error=error,
                stream=stream,
            )
        )

    def _now_us(self) -> int:
        """Wall time that a clock jump during the request can't turn backwards."""
        return self.started_us + (time.monotonic_ns() - self._mono_ns) // 1000


def _model_of(response: Json | None, request: Json | None) -> str | None:
    for body in (response, request):
        if body and isinstance(body.get("model"), str):
            return body["model"]
    return None


class Recorder:
    """Owns the trace file and, with REDIS_URL, the task that ships it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._writer = SegmentWriter(settings.queue_path.absolute(), settings.segment_bytes)
        self._tasks: list[asyncio.Task[None]] = []
        self._said_lost_at = 0.0
        self._shipper = _Shipper(settings) if settings.redis_url else None
        self.num_written = 0
        self.num_lost = 0

    def open(self) -> None:
        """Open the file. Raises SpecError when it can't be written."""
        try:
            self._writer.append([])
        except OSError as error:
            raise SpecError(
                f"FILE_QUEUE_PATH={str(self._settings.queue_path)!r} can't be written ({error.strerror}): "
                "choose a file in a folder that the gateway may write to"
            ) from error

    def start(self) -> None:
        """Start the background tasks of the running loop."""
        if self._settings.fsync_ms:
            self._tasks.append(asyncio.create_task(self._sync_forever()))
        if self._shipper:
            self._tasks.append(asyncio.create_task(self._shipper.run_forever()))

    def begin(self, endpoint: str) -> Recording:
        """Start the clock of one request."""
        return Recording(self, endpoint)

    def write(self, record: TraceRecord) -> None:
        """Append a record. A full disk costs the trace, never the answer; it is counted and said."""
        try:
            self._writer.append([record.to_line()])
            self.num_written += 1
        except (OSError, ValueError) as error:
            self.num_lost += 1
            if time.monotonic() - self._said_lost_at > 1.0:
                self._said_lost_at = time.monotonic()
                logger.error("lost %d traces so far: %s (%s)", self.num_lost, self._settings.queue_path, error)

    def counts(self) -> dict[str, Any]:  # Any: numbers and one flag
        """Return what /health shows of the traces."""
        counts: dict[str, Any] = {"written": self.num_written, "lost": self.num_lost}  # Any: as above
        if self._shipper:
            counts |= {"redis": self._shipper.is_up, "shipped": self._shipper.num_shipped}
        return counts

    async def stop(self) -> None:
        """Ship what can be shipped, make the file durable, let go of it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._shipper:
            await self._shipper.stop()
        await asyncio.to_thread(self._writer.close)

    async def _sync_forever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.fsync_ms / 1000)
            handle = self._writer.sync_handle()
            if handle is not None:
                try:
                    await asyncio.to_thread(sync_and_close, handle)
                except OSError as error:
                    logger.error("can't sync %s: %s", self._settings.queue_path, error.strerror)


class _Shipper:
    """Moves the trace file to Redis while Redis is there. One per file: others wait for its lock."""

    def __init__(self, settings: Settings) -> None:
        import redis  # 0.2 s to import: only a gateway with REDIS_URL pays it

        from tasks.traces.redis_stream import RedisQueue

        client = redis.Redis.from_url(settings.redis_url, socket_timeout=5, socket_connect_timeout=2)
        self._queue = RedisQueue(client)
        self._spool = FileQueue(settings.queue_path)
        self._locked = False
        self._one_thread = threading.Lock()  # a cancelled task leaves its thread running
        self.is_up = True
        self.num_shipped = 0

    async def run_forever(self) -> None:
        while True:
            await asyncio.sleep(await asyncio.to_thread(self._ship_all))

    async def stop(self) -> None:
        try:
            await asyncio.wait_for(asyncio.to_thread(self._ship_all), _LAST_SHIP_S)
        except TimeoutError:
            logger.warning("Redis is too slow: the rest stays in the file for the drain")
        self._spool.close()

    def _ship_all(self) -> float:
        """Ship until the file is empty; return how long to wait before looking again."""
        with self._one_thread:
            return self._ship_locked()

    def _ship_locked(self) -> float:
        from tasks.traces.redis_stream import ship

        try:
            self._locked = self._locked or self._spool.lock()
            while self._locked and (count := ship(self._spool, self._queue)):
                self.num_shipped += count
        except (TataraError, OSError) as error:
            if self.is_up:
                logger.warning("traces stay in the file: %s", error)
            self.is_up = False
            return _SHIP_RETRY_S
        if not self.is_up:
            logger.info("Redis is back: traces are shipped again")
        self.is_up = True
        return _SHIP_PAUSE_S if self._locked else _SHIP_RETRY_S
