"""Run one long child to its end, or follow the one that a dead parent left: its lines, its metrics, its silence.

    Job -> supervise() -> output.log to the log, metrics.jsonl to a callback

Ring: edge.  Units: seconds.
"""

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import processes
from tasks.lifeline import HEARTBEAT, forget_beats, read_beats
from tasks.liveness import HangError, Liveness
from tasks.processes import (
    Identity,
    Program,
    digest_argv,
    find_alive,
    start_detached,
    stop,
    write_identity,
)
from tasks.ranks import say_ranks

_POLL_S = 0.2
logger = logging.getLogger(__name__)


class Tail:
    """Read the whole lines that were appended to a file since the last look.

    A file that was replaced or cut is read from its start: a resumed trainer rewrites metrics.jsonl.
    """

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self.path = path
        self._offset, self._inode = 0, 0
        if from_end and path.exists():
            stat = path.stat()
            self._offset, self._inode = stat.st_size, stat.st_ino

    def lines(self) -> list[str]:
        """Return new lines without their ends; a torn last line waits for its rest."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as handle:
            stat = os.fstat(handle.fileno())
            if stat.st_ino != self._inode or stat.st_size < self._offset:
                self._offset, self._inode = 0, stat.st_ino
            handle.seek(self._offset)
            data = handle.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace").splitlines()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A supervised child: its folder holds process.json, output.log, metrics.jsonl and maybe heartbeat.json."""

    argv: list[str]
    env: dict[str, str]
    folder: Path
    stall_timeout_s: float
    heartbeat_timeout_s: float = 300.0
    grace_s: float = 30.0

    @property
    def identity_file(self) -> Path:
        """Who runs, or ran last."""
        return self.folder / "process.json"

    @property
    def log(self) -> Path:
        """Standard output and error of the child."""
        return self.folder / "output.log"

    @property
    def metrics(self) -> Path:
        """One JSON object per line, appended by the child."""
        return self.folder / "metrics.jsonl"


def supervise(job: Job, on_metrics: Callable[[dict[str, Any]], None]) -> None:  # Any: JSON values
    """Run `job` to its end, or go on with the one that a dead parent left running.

    Each output line is logged, each metrics line goes to `on_metrics`. When this process is told to
    end (a cancel in the UI comes as SIGTERM) or fails, the child is stopped first: SIGTERM, `grace_s`,
    SIGKILL. A cancellation from inside this process is no person's wish: it comes when the lease of a
    concurrency limit could not be renewed because the server was away. The child goes on then, and the
    next try follows it.
    Raises TimeoutError when it hangs: nothing moves for `stall_timeout_s`, or its heartbeat stands still
    for `heartbeat_timeout_s`. Whether it succeeded is for the caller to read from what the child left
    behind: an exit code dies with the parent.
    """
    identity = _find(job)
    output, metrics = Tail(job.log, from_end=True), Tail(job.metrics, from_end=True)
    if identity:
        logger.info("attached to pid %d, which an earlier try left running", identity.pid)
        write_identity(job.identity_file, identity)  # its starter may have been killed before it could
    else:
        stop(job.identity_file, job.grace_s)  # ranks that outlived a killed launcher
        forget_beats(job.folder)  # of a dead one
        program = Program(
            argv=tuple(job.argv),
            variables=job.env,
            identity_file=job.identity_file,
            log=job.log,
            digest=digest_argv(job.argv),
        )
        identity = start_detached(program)
    try:
        _follow(job, identity, output, metrics, on_metrics)
    except asyncio.CancelledError:
        logger.warning("cancelled from inside: pid %d goes on, and the next run of this follows it", identity.pid)
        raise
    except BaseException:
        stop(job.identity_file, job.grace_s)
        raise
    finally:
        report_new(output, metrics, on_metrics)
    stop(job.identity_file, job.grace_s)  # a rank that outlived its launcher


def find_running(root: Path) -> list[str]:
    """Return `kind/key` of each artifact below a store whose child runs, whether somebody supervises it or not."""
    alive = (path.parent for path in sorted(root.glob("*/*/process.json")) if processes.find_alive(path))
    return [f"{folder.parent.name}/{folder.name[:8]}" for folder in alive]


def stop_unwatched(root: Path, grace_s: float = 30.0) -> list[str]:
    """End the children below an artifact store that nobody supervises any more; return `kind/key` of each.

    Who supervises one holds its artifact's claim; a worker elsewhere that does is left alone.
    """
    stopped: list[str] = []
    for identity_file in sorted(root.glob("*/*/process.json")):
        folder = identity_file.parent
        if processes.is_locked(folder.parent / f".{folder.name}.lock"):  # as ArtifactStore.claim names it
            continue
        if processes.stop(identity_file, grace_s):
            stopped.append(f"{folder.parent.name}/{folder.name[:8]}")
    return stopped


def _find(job: Job) -> Identity | None:
    """Return the running child of this folder; one that runs another command is stopped first."""
    identity = find_alive(job.identity_file)
    if identity is None or identity.digest == digest_argv(job.argv):
        return identity
    logger.warning("pid %d runs an older command for this folder: stopping it", identity.pid)
    stop(job.identity_file, job.grace_s)
    return None


def _follow(
    job: Job, identity: Identity, output: Tail, metrics: Tail, on_metrics: Callable[[dict[str, Any]], None]
) -> None:
    liveness = Liveness(
        stall_timeout_s=job.stall_timeout_s, heartbeat_timeout_s=job.heartbeat_timeout_s, now=time.monotonic()
    )
    while True:
        alive = identity.is_alive()
        now = time.monotonic()
        if report_new(output, metrics, on_metrics):
            liveness.see_progress(now)
        if not alive:
            return
        liveness.see_beat(read_beat(job.folder / HEARTBEAT), now)
        try:
            if line := liveness.judge(now):
                logger.warning("%s", line)
        except HangError as hang:
            beats = read_beats(job.folder)
            ranks = f"; {say_ranks(beats, time.time())}" if len(beats) > 1 else ""
            raise TimeoutError(f"pid {identity.pid}: {hang}{ranks}") from None
        time.sleep(_POLL_S)


def read_beat(path: Path) -> dict[str, Any]:  # Any: JSON values
    """Return the heartbeat; nothing when there is none, or when a look met it half written."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def report_new(output: Tail, metrics: Tail, on_metrics: Callable[[dict[str, Any]], None]) -> bool:
    """Log each new line, hand each new record on; say whether there was one."""
    lines, records = output.lines(), metrics.lines()
    for line in lines:
        if line.strip():
            logger.info("%s", line.rpartition("\r")[2])
    for record in records:
        on_metrics(json.loads(record))
    return bool(lines or records)
