"""Long child processes that outlive their parent: start, recognise, follow, stop.

A trainer or server runs in a session of its own, so the death of a Prefect worker does not end
it; the next try finds it by its identity file. An identity is pid *and* start time, so a
recycled pid is never taken for ours, and never killed.

Ring: edge (Linux: /proc).  Units: seconds.
"""

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import files
from tasks.errors import CorruptError

_POLL_S = 0.2
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One process in the life of this machine. `started` is clock ticks since boot."""

    pid: int
    started: int
    argv_digest: str

    def is_alive(self) -> bool:
        """Say whether this very process still runs (a zombie does not)."""
        return _start_ticks(self.pid) == self.started


def _start_ticks(pid: int) -> int | None:
    """Return field 22 of /proc/<pid>/stat, or None when the process is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the command name may hold spaces and parentheses
    return None if fields[0] in ("Z", "X") else int(fields[19])


def digest_argv(argv: list[str]) -> str:
    """Return a short digest by which two command lines are told apart."""
    return hashlib.sha256("\0".join(argv).encode()).hexdigest()[:16]


def start_detached(argv: list[str], env: dict[str, str], log: Path, identity_file: Path) -> Identity:
    """Start `argv` in a session of its own, output appended to `log`, and write down who it is."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(  # detached on purpose: we follow it by identity
            argv, env=env, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
    started = _start_ticks(process.pid)
    identity = Identity(pid=process.pid, started=started or 0, argv_digest=digest_argv(argv))
    files.write_json(identity_file, {"pid": identity.pid, "started": identity.started, "argv": identity.argv_digest})
    return identity


def find_alive(identity_file: Path) -> Identity | None:
    """Return the process that `identity_file` names if it still runs."""
    if not identity_file.exists():
        return None
    try:
        data = files.read_json(identity_file)
        identity = Identity(pid=data["pid"], started=data["started"], argv_digest=data["argv"])
    except (CorruptError, KeyError, TypeError):
        return None
    _reap(identity.pid)
    return identity if identity.is_alive() else None


def _reap(pid: int) -> None:
    """Collect a finished child of ours, so that it is no zombie; others' children are left alone."""
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        os.waitpid(pid, os.WNOHANG)


def stop_group(identity: Identity, grace_s: float) -> None:
    """End a process and all that it started: SIGTERM, `grace_s` to finish, then SIGKILL."""
    for sign, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        if not _group_alive(identity):
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(identity.pid, sign)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and _group_alive(identity):
            _reap(identity.pid)
            time.sleep(0.05)


def _group_alive(identity: Identity) -> bool:
    """Say whether the process, or an orphan of its session, still runs."""
    _reap(identity.pid)
    if identity.is_alive():
        return True
    if _start_ticks(identity.pid) is not None:
        return False  # the pid was recycled: whoever has it now is not ours
    return any(_session(pid) == identity.pid for pid in _pids())


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _session(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[3]) if fields[0] not in ("Z", "X") else None
    return None


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
    """A supervised child: its folder holds process.json, output.log and metrics.jsonl."""

    argv: list[str]
    env: dict[str, str]
    folder: Path
    stall_timeout_s: float
    grace_s: float = 30.0

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

    Each output line is logged, each metrics line goes to `on_metrics`. When this process is
    cancelled or fails, the child is stopped first: SIGTERM, `grace_s`, SIGKILL. Raises TimeoutError
    when neither output nor metrics move for `stall_timeout_s`. Whether it succeeded is for the
    caller to read from what the child left behind: an exit code dies with the parent.
    """
    identity_file = job.folder / "process.json"
    identity = find_alive(identity_file)
    if identity and identity.argv_digest != digest_argv(job.argv):
        logger.warning("pid %d runs an older command for this folder: stopping it", identity.pid)
        stop_group(identity, job.grace_s)
        identity = None
    output, metrics = Tail(job.log, from_end=True), Tail(job.metrics, from_end=True)
    if identity:
        logger.info("attached to pid %d, which an earlier try left running", identity.pid)
    else:
        identity = start_detached(job.argv, job.env, job.log, identity_file)
        logger.info("started pid %d, output in %s", identity.pid, job.log)
    try:
        _follow(job, identity, output, metrics, on_metrics)
    except BaseException:
        stop_group(identity, job.grace_s)
        raise
    finally:
        _report(output, metrics, on_metrics)
    stop_group(identity, job.grace_s)  # a rank that outlived its launcher


def _follow(
    job: Job, identity: Identity, output: Tail, metrics: Tail, on_metrics: Callable[[dict[str, Any]], None]
) -> None:
    last_sign = time.monotonic()
    while True:
        _reap(identity.pid)
        alive = identity.is_alive()
        if _report(output, metrics, on_metrics):
            last_sign = time.monotonic()
        if not alive:
            return
        if time.monotonic() - last_sign > job.stall_timeout_s:
            raise TimeoutError(f"pid {identity.pid} gave no sign of life for {job.stall_timeout_s:.0f} s: it hangs")
        time.sleep(_POLL_S)


def _report(output: Tail, metrics: Tail, on_metrics: Callable[[dict[str, Any]], None]) -> bool:
    lines, records = output.lines(), metrics.lines()
    for line in lines:
        if line.strip():
            logger.info("%s", line.rpartition("\r")[2])
    for record in records:
        on_metrics(json.loads(record))
    return bool(lines or records)


def last_lines(path: Path, count: int = 30) -> str:
    """Return the end of a log for an error message."""
    if not path.exists():
        return "(no output)"
    return "\n".join(path.read_text(errors="replace").splitlines()[-count:])
