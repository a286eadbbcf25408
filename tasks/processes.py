"""Child processes that outlive their parent: start, recognise, stop; never touch one that is not ours.

    Program -> start_detached() -> Identity in its file -> find_alive() -> stop()

Trainers, vLLM, the gateway, Prefect's server and worker all run in sessions of their own, so the
death of whoever started them does not end them. Each is known three times, by what no kill can undo:

- a lock beside the identity file, taken before the start and inherited: while it is held somebody
  lives, and nobody starts a second one, on this host or on another that shares the folder;
- a marker in its environment and in that of all its children: it finds who holds the lock, also
  when the starter was killed before it could write anything down;
- the identity file: pid, start time, boot and host. A pid alone proves nothing: after a crash or a
  reboot the same number is another program.

Ring: edge (Linux: /proc).  Units: seconds, bytes; start times are clock ticks since boot.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import signal
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tasks import files
from tasks.errors import CorruptError, ServiceError, TransientError
from tasks.procfs import list_pids, read_boot_id, read_session, read_start_ticks, read_variables, send_signal

MARKER = "TATARA_PROCESS"  # whose process this is: the path of the identity file
_DIGEST = "TATARA_PROCESS_DIGEST"  # what it runs, for a start that nobody could write down
_LOCK_FD = 3
_LOCK_WAIT_S = 5.0  # from the fork to the marker; far above what a busy machine needs
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What is to be started and where that is written down. `variables` may hold secrets: not in the repr."""

    argv: tuple[str, ...]
    variables: dict[str, str] = field(repr=False)
    identity_file: Path
    log: Path
    digest: str  # of all that decides what it does; one that runs with another digest is replaced
    note: dict[str, str] = field(default_factory=dict)  # what a later look wants to know; no secrets


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One process in the life of one machine. `started` is clock ticks since boot."""

    pid: int
    started: int
    boot_id: str
    host: str
    digest: str = ""
    note: dict[str, str] = field(default_factory=dict)

    def is_here(self) -> bool:
        """Say whether it was started by this machine since its last boot."""
        return (self.boot_id, self.host) == (read_boot_id(), socket.gethostname())

    def is_alive(self) -> bool:
        """Say whether this very process still runs here (a zombie does not); reap it when it is our dead child."""
        if not self.is_here():
            return False
        with contextlib.suppress(ChildProcessError):  # it was started by another process
            os.waitpid(self.pid, os.WNOHANG)
        return read_start_ticks(self.pid) == self.started


def digest_argv(argv: tuple[str, ...] | list[str]) -> str:
    """Return a short digest by which two command lines are told apart."""
    return hashlib.sha256("\0".join(argv).encode()).hexdigest()[:16]


def start_detached(program: Program) -> Identity:
    """Start a program in a session of its own, output appended to its log, and write down who it is.

    No Popen object is kept: it would warn when dropped.
    Raises: ServiceError when it can't be started, TransientError when one of its name runs already.
    """
    for folder in (program.log.parent, program.identity_file.parent):
        folder.mkdir(parents=True, exist_ok=True)
    variables = {**program.variables, MARKER: _marker(program.identity_file), _DIGEST: program.digest}
    lock = _take_lock(program.identity_file)
    actions = [
        (os.POSIX_SPAWN_DUP2, lock, _LOCK_FD),  # from here the lock is the child's as well
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(program.log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    name = program.identity_file.stem
    try:
        pid = os.posix_spawnp(program.argv[0], program.argv, variables, file_actions=actions, setsid=True)
    except OSError as error:
        raise ServiceError(f"{name} did not start: {program.argv[0]}: {error.strerror}") from error
    finally:
        os.close(lock)
    identity = _identify(pid, program.digest, program.note)
    write_identity(program.identity_file, identity)
    logger.info("started %s, pid %d, output in %s", name, pid, program.log)
    return identity


def write_identity(identity_file: Path, identity: Identity) -> None:
    """Write down who a process is."""
    files.write_json(identity_file, asdict(identity))


def read_identity(identity_file: Path) -> Identity | None:
    """Return who was started last, whether it still runs or not; None when that can't be read."""
    try:
        return Identity(**files.read_json(identity_file))
    except (OSError, CorruptError, TypeError):
        return None


def find_alive(identity_file: Path) -> Identity | None:
    """Return the process that runs under this name here: by its file, else by its marker.

    A lock that is held while nothing is marked is a start between fork and exec: it is waited for.
    """
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        written = read_identity(identity_file)
        if written is not None and written.is_alive():
            return written
        marked = _find_marked(identity_file)
        elsewhere = written is not None and not written.is_here()
        if marked or elsewhere or not is_locked(_lock_path(identity_file)) or time.monotonic() > deadline:
            return _find_leader(marked, identity_file)
        time.sleep(0.02)


def find_members(identity_file: Path, leader: Identity | None) -> dict[int, int]:
    """Return pid -> start ticks of everything alive here that the program started, itself included."""
    pids = set(_find_marked(identity_file))
    if leader is not None and leader.is_alive():
        pids |= {leader.pid} | {pid for pid in list_pids() if read_session(pid) == leader.pid}
    ticks = {pid: read_start_ticks(pid) for pid in pids - {os.getpid()}}
    return {pid: start for pid, start in ticks.items() if start is not None}


def is_member(pid: int, identity_file: Path) -> bool:
    """Say whether a process belongs to the program of this name."""
    return pid in find_members(identity_file, find_alive(identity_file))


def resident_bytes(identity_file: Path) -> int:
    """Return the memory that stopping the program would give back."""
    page, total = os.sysconf("SC_PAGE_SIZE"), 0
    for pid in find_members(identity_file, find_alive(identity_file)):
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
    return total


def stop(identity_file: Path, grace_s: float = 20.0) -> bool:
    """End a program and all that it started; return whether something ran.

    SIGTERM to the leader, which ends its own children in order; once it is gone SIGTERM to those that
    it left; after `grace_s` SIGKILL to all. Raises ServiceError when even that leaves one.
    """
    leader = find_alive(identity_file)
    members = left = find_members(identity_file, leader)
    told: dict[int, int] = {leader.pid: leader.started} if leader else {}
    for pid, started in told.items():
        send_signal(pid, started, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while left and time.monotonic() < deadline:
        if leader is None or not leader.is_alive():
            for pid in left.keys() - told.keys():
                send_signal(pid, left[pid], signal.SIGTERM)
            told |= left
        time.sleep(0.05)
        left = find_members(identity_file, leader)
    deadline = time.monotonic() + 30.0
    while left:
        logger.warning("%s did not end within %g s: killed %s", identity_file.stem, grace_s, sorted(left))
        for pid, started in left.items():
            send_signal(pid, started, signal.SIGKILL)
        time.sleep(0.1)
        left = find_members(identity_file, leader)
        if left and time.monotonic() > deadline:
            raise ServiceError(
                f"{identity_file.stem} survives SIGKILL (pids {sorted(left)}): is its disk or GPU stuck?"
            )
    return bool(members)


def is_locked(path: Path) -> bool:
    """Say whether somebody holds the lock on a file, on this host or another; False when there is no file."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try_lock(handle)
    finally:
        os.close(handle)


def last_lines(path: Path, count: int = 30) -> str:
    """Return the end of a log for an error message. Cost: at most 64 KiB are read."""
    try:
        with path.open("rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - 65536))
            return "\n".join(handle.read().decode(errors="replace").splitlines()[-count:])
    except OSError:
        return "(no output)"


def _identify(pid: int, digest: str, note: dict[str, str]) -> Identity:
    return Identity(
        pid=pid,
        started=read_start_ticks(pid) or 0,
        boot_id=read_boot_id(),
        host=socket.gethostname(),
        digest=digest,
        note=note,
    )


def _marker(identity_file: Path) -> str:
    return str(identity_file.parent.resolve() / identity_file.name)


def _lock_path(identity_file: Path) -> Path:
    return identity_file.with_suffix(".lock")


def _take_lock(identity_file: Path) -> int:
    """Return the descriptor of the lock, held. Raises TransientError when somebody keeps it."""
    handle = os.open(_lock_path(identity_file), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOCK_WAIT_S
    while not _try_lock(handle):
        if time.monotonic() > deadline:
            os.close(handle)
            other = read_identity(identity_file)
            who = f"pid {other.pid} on host {other.host}" if other else "a process that could not write down who it is"
            raise TransientError(
                f"{identity_file.stem} of {identity_file.parent} is run by {who}: wait until it ends, or end it there"
            )
        time.sleep(0.05)
    return handle


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in files.UNSUPPORTED  # a disk without locks: the marker has to do
    return True


def _find_marked(identity_file: Path) -> list[int]:
    wanted = f"{MARKER}={_marker(identity_file)}".encode()
    found: list[int] = []
    for pid in list_pids():
        with contextlib.suppress(OSError):  # it ended, or it is another user's
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    return [pid for pid in found if read_start_ticks(pid) is not None]


def _find_leader(marked: list[int], identity_file: Path) -> Identity | None:
    """Return the marked process that leads its session and got the lock: the one that was started.

    The lock tells it from a child in a session of its own that outlived it.
    """
    for pid in marked:
        if read_session(pid) == pid and _holds_lock(pid, identity_file):
            found = _identify(pid, read_variables(pid).get(_DIGEST, ""), {})
            return found if found.started else None
    return None


def _holds_lock(pid: int, identity_file: Path) -> bool:
    try:
        return Path(f"/proc/{pid}/fd/{_LOCK_FD}").samefile(_lock_path(identity_file))
    except OSError:
        return False
