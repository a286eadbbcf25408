"""How much waits in a file queue, looked at from outside: no lock, nothing consumed.

    P.cursor + segments -> Backlog.look() -> records and bytes that wait, start of the oldest

Counts line ends, and each only once: a look costs what was appended since the last one, so a
gateway may look every second though a gigabyte waits.

Ring: edge (disk).  Units: bytes.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from tasks.traces.segments import active_number, read_cursor, sealed_segments

_BUFFER_BYTES = 256 << 10
_STARTED = re.compile(rb'"started_at":\s?"([0-9TZ:.-]{10,40})"')


@dataclass(frozen=True, slots=True, kw_only=True)
class BacklogState:
    """What waits at one moment."""

    waiting: int = 0
    waiting_bytes: int = 0
    oldest_at: str | None = None


class Backlog:
    """Looks at one file queue again and again."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._counted: dict[int, tuple[int, int]] = {}  # segment -> bytes looked at, line ends in them
        self._acked = (0, 0, 0)  # segment, bytes acknowledged in it, line ends in them
        # Read into again and again: looks come from any thread of a pool, and pieces made anew left a megabyte each in
        # the heap of every thread, which malloc never gave back.
        self._buffer = bytearray(_BUFFER_BYTES)

    def look(self) -> BacklogState:
        """Count what waits now. Raises CorruptError when the cursor can't be read."""
        if not self._path.parent.is_dir():
            return BacklogState()
        segments = sealed_segments(self._path)
        if self._path.exists():
            segments[active_number(self._path)] = self._path
        cursor = read_cursor(self._path)
        number, offset = cursor.acked if cursor else (min(segments, default=1), 0)
        segments = {key: place for key, place in segments.items() if key >= number}
        lines = sum(self._count(key, place) for key, place in segments.items())
        self._counted = {key: value for key, value in self._counted.items() if key in segments}
        done = self._count_acked(number, offset, segments.get(number))
        size = sum(at for at, _ in self._counted.values())
        oldest = _first_start(segments, number, offset)
        return BacklogState(waiting=max(0, lines - done), waiting_bytes=max(0, size - offset), oldest_at=oldest)

    def _count(self, number: int, place: Path) -> int:
        at, lines = self._counted.get(number, (0, 0))
        read, found = self._line_ends(place, at, None)
        if read < 0:  # shorter than it was: a person emptied it, or it is another file now
            at, lines = 0, 0
            read, found = self._line_ends(place, 0, None)
        self._counted[number] = (at + max(0, read), lines + found)
        return lines + found

    def _count_acked(self, number: int, offset: int, place: Path | None) -> int:
        if place is None or offset == 0:
            return 0
        known, at, lines = self._acked
        if known != number or at > offset:
            at, lines = 0, 0
        _, found = self._line_ends(place, at, offset)
        self._acked = (number, offset, lines + found)
        return lines + found

    def _line_ends(self, place: Path, start: int, end: int | None) -> tuple[int, int]:
        """Count line ends between two offsets; (bytes read, line ends). (-1, 0) when the file is shorter."""
        read, found, size = 0, 0, sys.maxsize if end is None else end - start
        try:
            with place.open("rb", buffering=0) as handle, memoryview(self._buffer) as view:
                if handle.seek(0, 2) < start:
                    return -1, 0
                handle.seek(start)
                while count := handle.readinto(view[: size - read]):
                    read += count
                    found += self._buffer.count(b"\n", 0, count)
        except FileNotFoundError:
            return 0, 0
        return read, found


def _first_start(segments: dict[int, Path], number: int, offset: int) -> str | None:
    """Read when the first record behind (number, offset) started."""
    for key in sorted(segments):
        try:
            with segments[key].open("rb") as handle:
                handle.seek(offset if key == number else 0)
                match = _STARTED.search(handle.read(1024))
        except FileNotFoundError:
            continue
        if match:
            return match[1].decode()
    return None
