"""What Linux tells about processes, and how one is signalled without hitting another.

Ring: edge (/proc).  Units: start times are clock ticks since boot.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path


def read_boot_id() -> str:
    """Return the id that the kernel draws at each boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def read_start_ticks(pid: int) -> int | None:
    """Return when a process started, or None when it is gone or a zombie."""
    fields = _read_stat(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def read_variables(pid: int) -> dict[str, str]:
    """Return the environment that a process was started with; empty when it is gone or another user's."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    pairs = (word.decode(errors="surrogateescape").partition("=") for word in words if word)
    return {name: value for name, _, value in pairs}


def list_pids() -> Iterator[int]:
    """Return the numbers of all processes that this one may see."""
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def read_session(pid: int) -> int | None:
    """Return the session of a process, or None when it is gone or a zombie."""
    fields = _read_stat(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[3])


def _read_stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/<pid>/stat from `state` on; the name before may hold spaces and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def send_signal(pid: int, started: int, number: signal.Signals) -> None:
    """Signal a process, unless its number belongs to another one by now."""
    try:
        handle = os.pidfd_open(pid)  # pins the process: between the look and the signal it can't be recycled
    except ProcessLookupError:
        return
    try:
        if read_start_ticks(pid) == started:
            signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)
