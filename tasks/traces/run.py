"""Drain the queue: read, send, and acknowledge after the sink confirmed.

    queue.read() -> queue.intend() -> sink.deliver() -> queue.bury(refused) -> queue.ack()

May be killed at any point and run again: what was tried before is asked for before it is sent again.

Ring: edge (queue and sink).
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import httpx
import redis

from tasks.errors import SpecError, TataraError, TransientError
from tasks.traces.fallback import FallbackSink
from tasks.traces.queue import FileQueue, QueuedTrace, TraceQueue
from tasks.traces.redis_stream import RedisQueue, ship
from tasks.traces.spec import DrainReport, DrainSpec, lag_seconds
from tasks.traces.wandb_sink import WandbOfflineSink
from tasks.traces.weave_sink import Delivery, WeaveSink

_MAX_FAILURES = 20
logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Where traces go. `deliver` settles every record of a batch or raises."""

    @property
    def name(self) -> str:
        """What the report calls it."""
        ...

    @property
    def batch_records(self) -> int:
        """How many records it takes at once."""
        ...

    def deliver(self, items: Sequence[QueuedTrace]) -> Delivery:
        """Store a batch; when it returns, all of it is stored, was stored before, or is refused."""
        ...


def drain_traces(queue: TraceQueue, sink: Sink, spec: DrainSpec) -> DrainReport:
    """Move queued records to the sink until the queue is empty or `spec.max_seconds` are over.

    A second drain at the same time returns at once and reads nothing. Raises TransientError when the
    sink or Redis is away: what was not acknowledged stays, and the next drain goes on there.
    """
    if not queue.lock():
        logger.info("another drain is at work: nothing to do")
        return DrainReport(status="busy", sink=sink.name)
    started, began = time.monotonic(), datetime.now(UTC)
    report = DrainReport(status="drained", sink=sink.name)
    try:
        while items := queue.read(sink.batch_records):
            first = next((item.record.started_at for item in items if item.record), None)
            report = replace(report, lag_before_s=report.lag_before_s or lag_seconds(first, began))
            report = _settle(queue, sink, items, report)
            if time.monotonic() - started > spec.max_seconds:
                report = replace(report, status="partial")
                break
        waiting, oldest = queue.lag()
    except Exception as error:
        error.add_note(f"{report.num_read} records settled in {time.monotonic() - started:.1f} s")
        with suppress(TransientError):  # the first error is the one that counts
            queue.unlock()
        raise
    queue.unlock()
    lag_s = lag_seconds(oldest, datetime.now(UTC))
    seconds = time.monotonic() - started
    report = replace(report, seconds=seconds, num_waiting=waiting, oldest_waiting=oldest, lag_s=lag_s, sink=sink.name)
    level = logging.INFO if report.num_read or waiting else logging.DEBUG
    logger.log(level, "drained %d traces to %s in %.1f s, %d wait", report.num_read, sink.name, seconds, waiting)
    return report


def _settle(queue: TraceQueue, sink: Sink, items: list[QueuedTrace], report: DrainReport) -> DrainReport:
    good = list({item.record.trace_id: item for item in reversed(items) if item.record}.values())[::-1]
    num_copies = sum(item.record is not None for item in items) - len(good)
    delivery = Delivery()
    if good:
        queue.intend(items)
        delivery = sink.deliver(good)
    letters = [(item, item.problem) for item in items if item.record is None] + delivery.refused
    if letters:
        queue.bury(letters)
        logger.warning("buried %d of %d records, the first: %s", len(letters), len(items), letters[0][1])
    queue.ack(items)
    return replace(
        report,
        num_read=report.num_read + len(items),
        num_delivered=report.num_delivered + delivery.num_delivered,
        num_already_there=report.num_already_there + delivery.num_already_there + num_copies,
        num_dead=report.num_dead + len(letters),
        failures=(*report.failures, *(reason for _, reason in letters))[:_MAX_FAILURES],
    )


def open_queue(path: Path, client: redis.Redis | None) -> TraceQueue:
    """Return the Redis queue when there is a client, else the file.

    With Redis, what a stopped gateway left in its spool is shipped first; a running one does it itself.
    """
    spool = FileQueue(path)
    if client is None:
        return spool
    queue = RedisQueue(client)
    if spool.path.parent.exists() and spool.lock():
        try:
            while ship(spool, queue):
                pass
        finally:
            spool.close()
    return queue


def queue_path(environ: Mapping[str, str]) -> Path:
    """Return FILE_QUEUE_PATH, or its default."""
    return Path(environ.get("FILE_QUEUE_PATH") or "./llm_traces.jsonl").expanduser()


def connect_redis(environ: Mapping[str, str]) -> redis.Redis | None:
    """Return a client for REDIS_URL, None without it. Raises SpecError when it is no URL."""
    url = environ.get("REDIS_URL")
    try:
        return redis.Redis.from_url(url, socket_timeout=10, socket_connect_timeout=5) if url else None
    except ValueError as error:
        raise SpecError(f"REDIS_URL is no redis://, rediss:// or unix:// URL ({error}): correct or unset it") from None


def queue_from_environment(environ: Mapping[str, str] = os.environ) -> TraceQueue:
    """Open the queue that a gateway with the same environment fills."""
    return open_queue(queue_path(environ), connect_redis(environ))


def queue_lag(queue: TraceQueue) -> tuple[int, str | None] | None:
    """Ask how much waits without becoming the consumer; None when the queue does not answer."""
    try:
        if isinstance(queue, FileQueue) and not queue.look():
            return 0, None
        return queue.lag()
    except (TataraError, OSError):
        return None


def weave_sink(client: httpx.Client, project_id: str, spec: DrainSpec, environ: Mapping[str, str] = os.environ) -> Sink:
    """Send to Weave through a client that a block or the environment made, with the fallback that `spec` names."""
    weave = WeaveSink(client, project_id, spec)
    if spec.fallback == "wait":
        return weave
    return FallbackSink(weave, _offline_sink(project_id.partition("/")[2], environ))


def _offline_sink(project: str, environ: Mapping[str, str]) -> WandbOfflineSink:
    return WandbOfflineSink(Path(environ.get("TATARA_HOME") or ".tatara") / "traces", project)


def sink_from_environment(spec: DrainSpec, environ: Mapping[str, str] = os.environ) -> Sink:
    """Weave when WANDB_API_KEY is set and WANDB_MODE is not offline, else a W&B offline run."""
    key = environ.get("WANDB_API_KEY")
    project = environ.get("WANDB_PROJECT") or "tatara"
    if not key or environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return _offline_sink(project, environ)
    entity = environ.get("WANDB_ENTITY")
    if not entity:
        raise SpecError(
            "WANDB_API_KEY is set but WANDB_ENTITY is not: set it to your W&B user or team "
            "(and WANDB_PROJECT, default 'tatara'), or WANDB_MODE=offline to keep traces on this machine"
        )
    base = environ.get("WF_TRACE_SERVER_URL") or "https://trace.wandb.ai"
    return weave_sink(httpx.Client(base_url=base, auth=("api", key)), f"{entity}/{project}", spec, environ)
