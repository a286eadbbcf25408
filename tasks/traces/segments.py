"""Segments: the files that make up a JSONL queue, and the writer that appends to them.

    SegmentWriter.append() -> P, the active segment -> sealed as P.000001, P.000002, ...

Every record is one line, written by one O_APPEND write, so a SIGKILL loses nothing that was
appended; `sync` is for power cuts. Several processes may append to the same path.

Ring: edge (disk).  Units: bytes.  A position is (segment number, offset of the record's end).
"""

import errno
import fcntl
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tasks import files
from tasks.errors import CorruptError

SEGMENT_BYTES = 16 << 20
Position = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """What is durable about consumption: acknowledged up to, and tried up to."""

    queue_id: str
    acked: Position = (1, 0)
    intended: Position = (1, 0)


def read_cursor(path: Path) -> Cursor | None:
    """Read P.cursor, or None when nothing was consumed yet."""
    place = Path(f"{path}.cursor")
    if not place.exists():
        return None
    value = files.read_json(place)
    try:
        (segment, offset), (tried, end) = value["acked"], value["intended"]
        return Cursor(queue_id=str(value["queue_id"]), acked=(segment, offset), intended=(tried, end))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(
            f"{place} is no cursor ({error}): delete it to deliver everything in {path} again"
        ) from error


def sealed_segments(path: Path) -> dict[int, Path]:
    """Return the sealed segments by number, oldest first."""
    prefix = f"{path.name}."
    found = (
        (entry.name.removeprefix(prefix), entry) for entry in path.parent.iterdir() if entry.name.startswith(prefix)
    )
    return dict(sorted((int(number), entry) for number, entry in found if number.isdecimal()))


def active_number(path: Path) -> int:
    """Return the number that the active segment will be sealed under.

    The folder is listed before the cursor is read: a consumer moves its cursor first and removes a
    segment afterwards, so a segment missing from the list is already in the cursor.
    """
    last_sealed = max(sealed_segments(path), default=0)
    cursor = read_cursor(path)
    return max(last_sealed, cursor.acked[0] - 1 if cursor else 0) + 1


class SegmentWriter:
    """Appends whole lines. Safe for several processes; not for several threads of one.

    An exclusive lock is held for the few microseconds of a write, so that a write that the disk cut
    short can be taken back before anybody writes behind it, and nobody writes to a segment after it
    got its number. Nothing here waits for the disk but `sync`: a segment is sealed by its rename, and
    synced with the next `sync`. Cost: about 10 us for a record of 1 kB.
    """

    def __init__(self, path: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.path = path
        self._name = str(path)  # what the system calls take: a Path is turned into it each time
        self._segment_bytes = segment_bytes
        self._fd = -1
        self._inode = 0
        self._end = 0  # of our own last write: when the file is still as long, its last line is whole
        self._unsynced = False
        self._to_sync: list[int] = []  # sealed segments and the folder: not durable yet

    def append(self, lines: Iterable[bytes]) -> None:
        """Write the lines, all in one write. Raises OSError (disk full) when none of them is there."""
        data = b"".join(lines)
        size = self._lock_current()
        try:
            if size and size != self._end and os.pread(self._fd, 1, size - 1) != b"\n":
                data = b"\n" + data  # a writer died inside its write: end its line, it counts as malformed
            written = os.write(self._fd, data) if data else 0
            if written != len(data):
                os.ftruncate(self._fd, size)
                raise OSError(
                    errno.ENOSPC, f"only {written} of {len(data)} bytes went into {self.path}: is the disk full?"
                )
            self._unsynced = True
            self._end = size + written
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        if size + len(data) >= self._segment_bytes:
            with suppress(OSError):  # the lines are written: a segment that can't be sealed now grows a little
                self._seal()

    def sync_handles(self) -> list[int]:
        """Return file descriptors to fdatasync and close in any thread; none when all is synced."""
        handles, self._to_sync = self._to_sync, []
        if self._unsynced and self._fd >= 0:
            self._unsynced = False
            handles.append(os.dup(self._fd))
        return handles

    def sync(self) -> None:
        """Make what was appended survive a power cut."""
        sync_and_close(self.sync_handles())

    def close(self) -> None:
        """Sync and let go of the file."""
        if self._fd >= 0:
            self.sync()
            os.close(self._fd)
            self._fd = -1

    def _lock_current(self) -> int:
        """Lock the file that is at `path` now, opening it anew when it was sealed or removed; return its size."""
        while True:
            if self._fd < 0:
                self._open()
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            try:
                found = os.stat(self._name)  # noqa: PTH116 - half the time of Path.stat
                if found.st_ino == self._inode:
                    return found.st_size
            except FileNotFoundError:
                pass
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        self._end = 0
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._inode = os.fstat(self._fd).st_ino
        if is_new:
            self._to_sync.append(os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC))

    def _seal(self) -> None:
        if self._lock_current() < self._segment_bytes:  # another writer was faster
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            return
        self.path.rename(f"{self.path}.{active_number(self.path):06d}")
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._to_sync.append(self._fd)
        self._fd = -1


def sync_and_close(handles: Iterable[int]) -> None:
    """Make files and folders durable and let go of them. Raises the first OSError after closing all."""
    problem: OSError | None = None
    for handle in handles:
        try:
            os.fdatasync(handle)
        except OSError as error:
            problem = problem or error
        finally:
            os.close(handle)
    if problem:
        raise problem
