"""One trace per request, written before the client sees the end of its answer.

    Recording.finish() -> a record's fields -> one O_APPEND write to the trace file -> (Redis, when set)
    Recording.finish(then=send) -> one write for all that end in this turn of the loop -> send() each answer

A trace is in the file before the last byte of its answer is sent, so a SIGKILL of the gateway loses
no trace of a request that was answered; what a power cut may cost is GATEWAY_TRACE_FSYNC_MS. The
write takes microseconds and is the only thing on the request's path: with REDIS_URL a background
task ships the file to the stream, and while Redis is away the file grows; while the disk is full,
traces wait in memory. Secrets are taken out before the write (tasks/traces/redaction.py).

Ring: edge (disk, network).
"""

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from deployments.gateway.routing import Choice, Json
from deployments.gateway.settings import Settings
from deployments.gateway.trace_settings import TraceSettings
from tasks.errors import SpecError, TataraError
from tasks.traces.backlog import Backlog, BacklogState
from tasks.traces.holding import HoldingWriter
from tasks.traces.record import (
    VERSION,
    Status,
    is_sampled,
    iso_from_us,
    line_of,
    usage_of,
    uuid7,
    without_secrets,
)
from tasks.traces.redaction import Redactor, read_patterns
from tasks.traces.segments import SegmentWriter, sync_and_close

_UNREAD = Choice(route="none", reason="bad-request")
ALWAYS = -1  # GATEWAY_TRACE_FSYNC_MS=always
_TEND_S = 1.0
_TEND_FULL_S = 0.1  # while traces wait in memory
logger = logging.getLogger(__name__)


class Recording:
    """What is known of one request so far; `finish` writes it, once."""

    __slots__ = (
        "_mono_ns",
        "_recorder",
        "adapter_digest",
        "choice",
        "endpoint",
        "finished",
        "first_us",
        "key_name",
        "model_digest",
        "request",
        "run_id",
        "started_us",
        "trace_id",
        "upstream",
    )

    def __init__(self, recorder: "Recorder", endpoint: str) -> None:
        self._recorder = recorder
        self.endpoint = endpoint
        self.started_us = time.time_ns() // 1000
        self._mono_ns = time.monotonic_ns()
        self.trace_id = uuid7(self.started_us, random.getrandbits(62))
        self.first_us: int | None = None
        self.request: Json | None = None
        self.choice = _UNREAD
        self.finished = False
        self.key_name: str | None = None  # who asked: the name of the API key
        self.upstream: str | None = None  # which of several servers answered
        self.model_digest: str | None = None
        self.adapter_digest: str | None = None
        self.run_id: str | None = None

    def note_upstream(self, name: str | None, ids: tuple[str, str, str]) -> None:
        """Note which server is asked: its name, and the digests of model and adapter and the run behind it."""
        self.upstream = name
        model, adapter, run = ids
        self.model_digest, self.adapter_digest, self.run_id = model or None, adapter or None, run or None

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
        then: Callable[[], None] | None = None,
    ) -> None:
        """Write the trace. A second call is ignored: the first outcome is the one that counts.

        With `then` it is written before this turn of the loop is over, with those of other requests, and `then` is
        called: it must not raise.
        """
        assert then is None or not self.finished, "nobody would send the answer"
        if self.finished:
            return
        self.finished = True
        rate = 1.0 if status != "ok" else self._recorder.sample_rate
        sampled = is_sampled(self.trace_id, self._recorder.sample_rate)
        if not sampled and rate < 1.0:
            self._recorder.num_sampled_out += 1
            if then is not None:
                then()
            return
        self._recorder.write(
            {  # the fields of a TraceRecord: making one costs more than all the rest of this
                "trace_id": self.trace_id,
                "started_at": iso_from_us(self.started_us),
                "ended_at": iso_from_us(self._now_us()),
                "first_token_at": iso_from_us(self.first_us) if self.first_us else None,
                "endpoint": self.endpoint,
                "route": self.choice.route,
                "reason": self.choice.reason,
                "model": _model_of(response, self.request),
                "status": status,
                "http_status": http_status,
                "streamed": stream is not None,
                "request": without_secrets(self.request) if self.request is not None else None,
                "response": response,
                "usage": usage_of(response),
                "error": error,
                "stream": stream,
                "key_name": self.key_name,
                "upstream": self.upstream,
                "model_digest": self.model_digest,
                "adapter_digest": self.adapter_digest,
                "run_id": self.run_id,
                "sampled": sampled,
                "sample_rate": rate,
                "redactions": None,
                "replayed": False,
                "version": VERSION,
            },
            then,
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
    """Owns the trace file and the background tasks around it."""

    def __init__(self, settings: Settings, traces: TraceSettings | None = None) -> None:
        self._settings = settings
        self._traces = traces or TraceSettings.from_environment(os.environ)
        self._segments = SegmentWriter(settings.queue_path.absolute(), settings.segment_bytes)
        self._file = HoldingWriter(self._segments, self._traces.hold_records, self._traces.hold_bytes)
        self._redactor = _redactor(self._traces)
        self._backlog, self._waiting = Backlog(settings.queue_path), BacklogState()
        self._tasks: list[asyncio.Task[None]] = []
        self._lines: list[bytes] = []  # to be written in this turn of the loop,
        self._owed: list[Callable[[], None]] = []  # and what is to be called then
        self._shipper = self._direct = None
        if settings.redis_url:
            from deployments.gateway.shipper import Shipper  # and with it redis

            self._shipper = Shipper(settings)
        if self._traces.direct:
            from deployments.gateway.direct import DirectDrain

            self._direct = DirectDrain(settings)
        self.sample_rate = self._traces.sample_rate
        self.num_sampled_out = 0
        self.num_redacted = 0
        self.num_failed_syncs = 0

    def open(self) -> None:
        """Open the file. Raises SpecError when it can't be written."""
        try:
            self._segments.append([])
        except OSError as error:
            raise SpecError(
                f"FILE_QUEUE_PATH={str(self._settings.queue_path)!r} can't be written ({error.strerror}): "
                "choose a file in a folder that the gateway may write to"
            ) from error
        if self._direct:
            self._direct.check()

    def start(self) -> None:
        """Start the background tasks of the running loop."""
        work = [self._tend_forever()]
        if self._settings.fsync_ms > 0:
            work.append(self._sync_forever())
        if self._shipper:
            work.append(self._shipper.run_forever())
        if self._direct:
            work.append(self._direct.run_forever())
        self._tasks += [asyncio.create_task(each) for each in work]

    def begin(self, endpoint: str) -> Recording:
        """Start the clock of one request."""
        return Recording(self, endpoint)

    def write(self, record: Json, then: Callable[[], None] | None = None) -> None:
        """Append a record, without its secrets. A full disk delays the trace, never the answer.

        With `then` the write waits for others of this turn of the loop: a system call costs more than a record.
        """
        if self._traces.bodies == "none":
            record = _without_bodies(record)
        try:
            redacted = self._redactor.redact(record)
            line = line_of(redacted)
            self.num_redacted += redacted is not record
        except Exception as error:  # noqa: BLE001 - nests too deep, or a fault of ours: its answer goes all the same
            logger.error("trace %s keeps its metadata only (%s)", record["trace_id"], type(error).__name__)
            bare = _without_bodies(record) | {"usage": None, "error": record["error"] and type(error).__name__}
            line = line_of(bare)
        self._lines.append(line)
        if then is None:
            self.flush()
        else:
            if not self._owed:
                asyncio.get_running_loop().call_soon(self.flush)
            self._owed.append(then)

    def flush(self) -> None:
        """Write what was kept for this turn of the loop, and have its answers sent."""
        if not self._lines:
            return
        lines, self._lines, owed, self._owed = self._lines, [], self._owed, []
        try:
            self._file.append(*lines)
            if self._settings.fsync_ms == ALWAYS:
                self._sync(self._segments.sync_handles())
        finally:
            for send in owed:
                try:
                    send()
                except Exception:  # of one client: the others wait for theirs
                    logger.exception("an answer could not be sent")

    def counts(self) -> dict[str, Any]:  # Any: numbers and flags
        """Return what /health shows of the traces."""
        counts: dict[str, Any] = {  # Any: as above
            "written": self._file.num_written,
            "lost": self._file.num_lost,
            "buffered": self._file.num_held,
            "sampled_out": self.num_sampled_out,
            "redacted": self.num_redacted,
            "failed_syncs": self.num_failed_syncs,
            "waiting": self._waiting.waiting,
            "waiting_bytes": self._waiting.waiting_bytes,
            "lag_s": _age_s(self._waiting.oldest_at),
        }
        if self._shipper:
            counts |= {"redis": self._shipper.is_up, "shipped": self._shipper.num_shipped}
        if self._direct:
            counts |= {"direct": self._direct.is_up}
        return counts

    async def stop(self) -> None:
        """Write what waits in memory, ship what can be shipped, make the file durable, let go of it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.flush()
        self._file.give_up()
        if self._shipper:
            await self._shipper.stop()
        if self._direct:
            await self._direct.stop()
        try:
            await asyncio.to_thread(self._segments.close)
        except OSError as error:
            logger.error("can't sync %s: %s", self._settings.queue_path, error.strerror)

    async def _tend_forever(self) -> None:
        """Write what waits in memory as soon as the disk takes it; look how much waits in the file."""
        while True:
            self._file.flush()
            try:
                self._waiting = await asyncio.to_thread(self._backlog.look)
            except (OSError, TataraError) as error:
                logger.warning("can't say how many traces wait: %s", error)
            await asyncio.sleep(_TEND_FULL_S if self._file.num_held else _TEND_S)

    async def _sync_forever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.fsync_ms / 1000)
            if handles := self._segments.sync_handles():
                await asyncio.to_thread(self._sync, handles)

    def _sync(self, handles: list[int]) -> None:
        try:
            sync_and_close(handles)
        except OSError as error:
            self.num_failed_syncs += 1
            logger.error("can't sync %s: %s", self._settings.queue_path, error.strerror)


def _redactor(traces: TraceSettings) -> Redactor:
    if traces.patterns is None:
        return Redactor(kinds=traces.kinds)
    try:
        text = traces.patterns.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"GATEWAY_REDACT_PATTERNS={str(traces.patterns)!r} can't be read ({error}): name a text file with one "
            "regular expression per line, or unset it"
        ) from error
    return Redactor(kinds=traces.kinds, patterns=read_patterns(text, str(traces.patterns)))


def _without_bodies(record: Json) -> Json:
    """Keep metadata only; an upstream's error message may repeat the prompt."""
    error = record["error"]
    if error and record["status"] == "upstream_error":
        error = f"status {record['http_status']}"
    redactions = {**(record["redactions"] or {}), "bodies": 1}
    return record | {"request": None, "response": None, "error": error, "redactions": redactions}


def _age_s(moment: str | None) -> float:
    """Seconds since then; 0 when nothing waits."""
    if moment is None:
        return 0.0
    return round(max(0.0, (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()), 1)
