"""Whether a port is free, and who holds it.

Ring: edge (Linux /proc).
"""

import errno
import socket
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import SpecError

_LISTEN = "0A"  # TCP state in /proc/net/tcp


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Who holds a port; pid 0 when it belongs to another user and can't be seen."""

    pid: int
    command: str


def is_port_free(host: str, port: int) -> bool:
    """Say whether a service could bind to the address now.

    Raises SpecError when the machine has no such address: another port would not help.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is no obstacle
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno in {errno.EADDRINUSE, errno.EACCES}:
                return False
            raise SpecError(
                f"host {host!r} can't be bound here ({error.strerror}): use 127.0.0.1, 0.0.0.0 for all addresses, or "
                "an address of this machine as `ip addr` lists it"
            ) from error
    return True


def find_listener(port: int) -> Listener:
    """Return who listens on a port, as far as this user may see it."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    if not sockets:
        return Listener(pid=0, command="nobody that listens; this user may not bind it, or it is being given back")
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
