"""Segments: the files that make up a JSONL queue, and the writer that appends to them.

    SegmentWriter.append() -> P, the active segment -> sealed as P.000001, P.000002, ...

Every record is one line, written by one O_APPEND write, so a SIGKILL loses nothing that was
appended; `sync` is for power cuts. Several processes may append to the same path.

Ring: edge (disk).  Units: bytes.  A position is (segment number, offset of the record's end).
"""

import fcntl
import os
from collections.abc import Iterable
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

    A shared lock on the segment while writing, an exclusive one while sealing: nobody writes to a
    segment after it got its number. Cost: about 10 us for a record of 1 kB.
    """

    def __init__(self, path: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.path = path
        self._segment_bytes = segment_bytes
        self._fd = -1
        self._inode = 0
        self._torn = False
        self._unsynced = False

    def append(self, lines: Iterable[bytes]) -> None:
        """Write the lines, all in one write. Raises OSError (disk full) when they are not all there."""
        data = b"".join(lines)
        self._lock_current(fcntl.LOCK_SH)
        try:
            data = b"\n" + data if self._torn else data
            self._torn = True
            written = os.write(self._fd, data)
            self._unsynced = True
            if written != len(data):
                raise OSError(f"only {written} of {len(data)} bytes went into {self.path}: is the disk full?")
            self._torn = False
            full = os.lseek(self._fd, 0, os.SEEK_END) >= self._segment_bytes
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        if full:
            self._seal()

    def sync_handle(self) -> int | None:
        """Return a file descriptor to fdatasync and close in any thread, or None when all is synced."""
        if not self._unsynced or self._fd < 0:
            return None
        self._unsynced = False
        return os.dup(self._fd)

    def sync(self) -> None:
        """Make what was appended survive a power cut."""
        handle = self.sync_handle()
        if handle is not None:
            sync_and_close(handle)

    def close(self) -> None:
        """Sync and let go of the file."""
        if self._fd >= 0:
            self.sync()
            os.close(self._fd)
            self._fd = -1

    def _lock_current(self, mode: int) -> None:
        """Lock the file that is at `path` now, opening it anew when it was sealed or removed."""
        while True:
            if self._fd < 0:
                self._open()
            fcntl.flock(self._fd, mode)
            try:
                if self.path.stat().st_ino == self._inode:
                    return
            except FileNotFoundError:
                pass
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._inode = os.fstat(self._fd).st_ino
        fcntl.flock(self._fd, fcntl.LOCK_EX)  # nobody writes now: an unfinished last line was torn by a crash
        size = os.fstat(self._fd).st_size
        self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"
        if self._torn:
            os.write(self._fd, b"\n")
            self._torn = False
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _seal(self) -> None:
        self._lock_current(fcntl.LOCK_EX)
        try:
            if os.fstat(self._fd).st_size >= self._segment_bytes:  # else another writer was faster
                os.fdatasync(self._fd)
                self.path.rename(f"{self.path}.{active_number(self.path):06d}")
                files.fsync_folder(self.path.parent)
        finally:
            os.close(self._fd)
            self._fd = -1


def sync_and_close(handle: int) -> None:
    """Make a file's data durable and let go of it."""
    try:
        os.fdatasync(handle)
    finally:
        os.close(handle)
