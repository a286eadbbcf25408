"""Start, find and stop one detached service, and never touch a process that is not ours.

    spawn() -> record (pid, start time, boot, digest) -> find_running() -> end_process()

A service is known twice: by its record file, and by a marker in its environment. The marker also
finds what a killed starter left behind before it could write the record, and every child.

Ring: edge (Linux /proc).  Units: seconds; start times are clock ticks since boot, as /proc gives them.
Trap: a pid alone proves nothing. After a crash or a reboot the same number is another program, so
      every look compares the start time and the boot id first.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tasks import files
from tasks.errors import ServiceError

MARKER = "TATARA_SERVICE"
_LISTEN = "0A"  # TCP state in /proc/net/tcp

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What is to be started. `variables` is the whole environment and may hold a token: not in the repr."""

    name: str
    argv: tuple[str, ...]
    variables: dict[str, str] = field(repr=False)
    digest: str
    folder: Path

    @property
    def log(self) -> Path:
        """Return the file that takes the service's stdout and stderr."""
        return self.folder / f"{self.name}.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A process that we started; `digest` is that of the command, model and settings it runs with."""

    pid: int
    start_ticks: int
    boot_id: str
    digest: str
    note: dict[str, str] = field(default_factory=dict)  # what `restart` and `status` want to know; no secrets


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Who holds a port; pid 0 when it belongs to another user and can't be seen."""

    pid: int
    command: str


def read_boot_id() -> str:
    """Return the id that the kernel draws at each boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def read_start_ticks(pid: int) -> int | None:
    """Return when a process started, or None when it is gone or a zombie."""
    fields = _read_stat(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def is_alive(record: Record) -> bool:
    """Say whether the very process of the record runs; reap it when it is our dead child."""
    with contextlib.suppress(ChildProcessError):  # started by another process, usually a worker that is gone
        os.waitpid(record.pid, os.WNOHANG)
    return record.boot_id == read_boot_id() and read_start_ticks(record.pid) == record.start_ticks


def find_running(folder: Path, name: str) -> Record | None:
    """Return our running service: by its record, else by its marker (its starter was killed in between)."""
    record = read_record(folder, name)
    if record is not None and is_alive(record):
        return record
    marked = _find_marked(_marker(folder, name))
    if not marked:
        return None
    leader = next((pid for pid in marked if _session(pid) == pid), min(marked))
    ticks = read_start_ticks(leader)
    if ticks is None:
        return None
    return Record(pid=leader, start_ticks=ticks, boot_id=read_boot_id(), digest="")  # equals no command: replaced


def read_record(folder: Path, name: str) -> Record | None:
    """Return the last record of a service; None when there is none or it can't be read."""
    try:
        return Record(**json.loads((folder / f"{name}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def spawn(service: Service, note: dict[str, str]) -> Record:
    """Start a service in its own session, with its output in its log, and record it.

    The process outlives its starter. No Popen object is kept: it would warn when dropped.
    Raises ServiceError when the program can't be started.
    """
    service.folder.mkdir(parents=True, exist_ok=True)
    if service.log.exists():
        service.log.replace(service.log.with_suffix(".log.old"))
    variables = {**service.variables, MARKER: _marker(service.folder, service.name)}
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(service.log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    try:
        pid = os.posix_spawn(service.argv[0], service.argv, variables, file_actions=actions, setsid=True)
    except OSError as error:
        raise ServiceError(f"{service.name} did not start: {service.argv[0]}: {error.strerror}") from error
    record = Record(
        pid=pid, start_ticks=read_start_ticks(pid) or 0, boot_id=read_boot_id(), digest=service.digest, note=note
    )
    files.write_json(service.folder / f"{service.name}.json", asdict(record))
    _logger.info("started %s, pid %d, log %s", service.name, pid, service.log)
    return record


def end_process(folder: Path, name: str, *, grace_s: float = 20.0) -> bool:
    """Stop a service and all its children; return whether there was one.

    SIGTERM to the service, which ends its own children in order; after `grace_s` SIGKILL to
    whatever is left of its session and marker.
    """
    record = find_running(folder, name)
    members = _find_members(folder, name, record)
    if record is not None:
        _send(record.pid, record.start_ticks, signal.SIGTERM)
    for pid, ticks in members.items():
        if record is None or not is_alive(record):
            _send(pid, ticks, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and (left := _find_members(folder, name, record)):
        time.sleep(0.05)
        members |= left
    while left := _find_members(folder, name, record):
        _logger.warning("%s did not end within %.0f s: killed %s", name, grace_s, sorted(left))
        for pid, ticks in left.items():
            _send(pid, ticks, signal.SIGKILL)
        time.sleep(0.1)
    (folder / f"{name}.json").unlink(missing_ok=True)
    if members:
        _logger.info("stopped %s", name)
    return bool(members)


def resident_bytes(folder: Path, name: str) -> int:
    """Return the memory that ending the service would give back."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = 0
    for pid in _find_members(folder, name, find_running(folder, name)):
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
        except OSError:
            continue
    return total


def is_member(pid: int, folder: Path, name: str) -> bool:
    """Say whether a process belongs to a service of ours."""
    return pid in _find_members(folder, name, find_running(folder, name))


def read_tail(path: Path, num_lines: int = 30) -> str:
    """Return the last lines of a log. Cost: at most 64 KiB are read."""
    try:
        with path.open("rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - 65536))
            return "\n".join(handle.read().decode(errors="replace").splitlines()[-num_lines:])
    except OSError:
        return "(no log)"


def is_port_free(host: str, port: int) -> bool:
    """Say whether a service could bind to the address now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is no obstacle
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def find_listener(port: int) -> Listener:
    """Return who listens on a port, as far as this user may see it."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(entry.readlink()) in sockets:
                pid = int(entry.parts[2])
                return Listener(pid=pid, command=_read_command(pid))
        except OSError:
            continue  # it ended, or it is another user's
    return Listener(pid=0, command="a process that this user may not see")


def _listening_inodes(port: int) -> list[str]:
    rows: list[str] = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if Path(table).exists():
            rows += Path(table).read_text().splitlines()[1:]
    cells = [row.split() for row in rows]
    return [cell[9] for cell in cells if cell[3] == _LISTEN and int(cell[1].rsplit(":", 1)[1], 16) == port]


def _read_command(pid: int) -> str:
    text = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return text if len(text) <= 120 else f"{text[:117]}..."


def _read_stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/<pid>/stat from `state` on; the name before may hold spaces and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _session(pid: int) -> int | None:
    fields = _read_stat(pid)
    return None if fields is None else int(fields[3])


def _marker(folder: Path, name: str) -> str:
    return f"{folder.resolve()}:{name}"


def _find_marked(marker: str) -> list[int]:
    wanted = f"{MARKER}={marker}".encode()
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue  # it ended, or it is another user's
    return [pid for pid in found if read_start_ticks(pid) is not None]


def _find_members(folder: Path, name: str, record: Record | None) -> dict[int, int]:
    """Return pid -> start ticks of everything alive that belongs to a service."""
    pids = set(_find_marked(_marker(folder, name)))
    if record is not None and is_alive(record):
        pids.add(record.pid)
        pids |= {int(p.name) for p in Path("/proc").glob("[0-9]*") if _session(int(p.name)) == record.pid}
    ticks = {pid: read_start_ticks(pid) for pid in pids}
    return {pid: start for pid, start in ticks.items() if start is not None}


def _send(pid: int, ticks: int, number: signal.Signals) -> None:
    """Signal a process, unless its number belongs to another one by now."""
    try:
        handle = os.pidfd_open(pid)  # pins the process: between the look and the signal it can't be recycled
    except ProcessLookupError:
        return
    try:
        if read_start_ticks(pid) == ticks:
            signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)
