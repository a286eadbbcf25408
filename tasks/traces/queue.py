"""The durable queue between the gateway and the drain, on plain files.

    gateway -> SegmentWriter.append() -> llm_traces.jsonl -> FileQueue.read() -> deliver -> ack()

Files beside the one that is written (P = FILE_QUEUE_PATH):

    P              the active segment: one record per line, each written by one O_APPEND write
    P.000007       a sealed segment; removed when its last record is acknowledged
    P.cursor       what is acknowledged, and up to where a delivery was ever tried
    P.dead         dead letters: {"reason", "line"}, one per line
    P.lock         held by the one consumer; the kernel frees it when that process dies

Any number of processes may append, one may consume. A reader that comes back after SIGKILL finds
the records whose delivery was tried marked `redelivered`, so that it asks the sink before it sends
them again. A last line without its end is being written, or was torn by a crash: a reader leaves
it alone, the next writer ends it, and then it counts as malformed.

Ring: edge (disk).  Units: bytes.  A position is (segment number, offset of the record's end).
"""

import fcntl
import json
import logging
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

from tasks import files
from tasks.errors import CorruptError
from tasks.traces.record import TraceRecord, from_line
from tasks.traces.segments import (
    SEGMENT_BYTES,
    Cursor,
    Position,
    SegmentWriter,
    active_number,
    read_cursor,
    sealed_segments,
)

READ_BYTES = 16 << 20  # one read stops here, however many records were asked for
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedTrace:
    """A record on its way; `record` is None and `problem` set when its line can't be read."""

    id: str
    line: bytes
    record: TraceRecord | None
    problem: str = ""
    redelivered: bool = False

    @classmethod
    def parse(cls, id: str, line: bytes, *, redelivered: bool) -> "QueuedTrace":
        """Read a line of the queue; a bad one becomes an entry with a problem, not an error."""
        try:
            record = from_line(line)
            return cls(id=id, line=line, record=record, redelivered=redelivered or record.replayed)
        except CorruptError as error:
            return cls(id=id, line=line, record=None, problem=str(error), redelivered=redelivered)


class TraceQueue(Protocol):
    """What the drain needs of a queue. A record leaves it by `ack` only."""

    def append(self, lines: Iterable[bytes]) -> None:
        """Add records, as lines."""
        ...

    def lock(self) -> bool:
        """Become the one consumer, or return False at once when another one is at work."""
        ...

    def unlock(self) -> None:
        """Stop being the consumer."""
        ...

    def read(self, limit: int) -> list[QueuedTrace]:
        """Return the next records, at most `limit`; an empty list when there are no more."""
        ...

    def intend(self, items: Sequence[QueuedTrace]) -> None:
        """Note durably that these records are about to be sent."""
        ...

    def bury(self, letters: Sequence[tuple[QueuedTrace, str]]) -> None:
        """Keep refused records, with the reason, where a person finds them."""
        ...

    def ack(self, items: Sequence[QueuedTrace]) -> None:
        """Take these records off the queue: they are in the sink, or buried."""
        ...

    def lag(self) -> tuple[int, str | None]:
        """Return how many records wait, and when the oldest of them started."""
        ...


class FileQueue:
    """The one consumer of a JSONL queue; `append` makes it a whole `TraceQueue`."""

    def __init__(self, path: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.path = path.absolute()
        self._writer = SegmentWriter(self.path, segment_bytes)
        self._lock: BinaryIO | None = None
        self._cursor = Cursor(queue_id="")
        self._next: Position = (1, 0)

    def append(self, lines: Iterable[bytes]) -> None:
        """Add records; see SegmentWriter."""
        self._writer.append(lines)

    def close(self) -> None:
        """Let go of the lock and the files."""
        self.unlock()
        self._writer.close()

    @property
    def queue_id(self) -> str:
        """A name that stays with this queue's cursor. Known after `lock`."""
        return self._cursor.queue_id

    def lock(self) -> bool:
        """Become the one consumer and go to the first record that is not acknowledged."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = Path(f"{self.path}.lock").open("ab")  # noqa: SIM115 - held until unlock
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            return False
        self._lock = handle
        if not self._go_to_cursor():
            self._save(replace(self._cursor, queue_id=uuid.uuid4().hex))
        return True

    def look(self) -> bool:
        """Go to the first record that is not acknowledged without becoming the consumer: `read`, but no more.

        False when there is no queue yet.
        """
        if not self.path.parent.is_dir():
            return False
        self._go_to_cursor()
        return True

    def _go_to_cursor(self) -> bool:
        cursor = read_cursor(self.path)
        if cursor is None:
            first = min(sealed_segments(self.path), default=1)
            self._cursor = Cursor(queue_id="", acked=(first, 0), intended=(first, 0))
        else:
            self._cursor = cursor
        self._next = self._cursor.acked
        return cursor is not None

    def unlock(self) -> None:
        """Stop being the consumer."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def rewind(self) -> None:
        """Read again what was read but not acknowledged."""
        self._next = self._cursor.acked

    def read(self, limit: int) -> list[QueuedTrace]:
        """Return the next whole lines, at most `limit` and about 16 MiB of them."""
        items: list[QueuedTrace] = []
        room = READ_BYTES
        while len(items) < limit and room > 0:
            opened = self._open_segment()
            if opened is None:
                break
            handle, sealed = opened
            with handle:
                room, at_end = self._read_lines(handle, sealed, items, limit, room)
            if not at_end:
                continue
            if not sealed:
                break
            self._next = (self._next[0] + 1, 0)
        return items

    def intend(self, items: Sequence[QueuedTrace]) -> None:
        """Note durably that everything up to the last of `items` is about to be sent."""
        end = _position(items[-1].id)
        if end > self._cursor.intended:
            self._save(replace(self._cursor, intended=end))

    def bury(self, letters: Sequence[tuple[QueuedTrace, str]]) -> None:
        """Append to P.dead and sync it: a dead letter is safe before its record is acknowledged."""
        dead = SegmentWriter(Path(f"{self.path}.dead"), segment_bytes=1 << 62)
        dead.append(
            json.dumps({"reason": reason, "line": item.line.decode(errors="replace").rstrip("\n")}).encode() + b"\n"
            for item, reason in letters
        )
        dead.close()

    def ack(self, items: Sequence[QueuedTrace]) -> None:
        """Move the cursor past `items`, which end where a `read` ended, and drop finished segments."""
        acked = _position(items[-1].id)
        self._save(replace(self._cursor, acked=acked, intended=max(acked, self._cursor.intended)))
        for number, segment in sealed_segments(self.path).items():
            if number < acked[0]:
                segment.unlink()

    def lag(self) -> tuple[int, str | None]:
        """Count the lines that wait. Cost: one pass over them."""
        where = self._next
        count, oldest = 0, None
        while items := self.read(1000):
            count += len(items)
            oldest = oldest or next((item.record.started_at for item in items if item.record), None)
        self._next = where
        return count, oldest

    def _save(self, cursor: Cursor) -> None:
        value = {"queue_id": cursor.queue_id, "acked": cursor.acked, "intended": cursor.intended}
        files.write_json(Path(f"{self.path}.cursor"), value)
        self._cursor = cursor

    def _open_segment(self) -> tuple[BinaryIO, bool] | None:
        """Open the segment that `_next` points into; (file, is it sealed), or None when it does not exist yet."""
        while True:
            later = {number: place for number, place in sealed_segments(self.path).items() if number >= self._next[0]}
            if later:
                number = next(iter(later))
                try:
                    handle = later[number].open("rb")
                except FileNotFoundError:
                    continue  # we only look, and the consumer is done with it
                return self._checked(handle, number), True
            try:
                handle = self.path.open("rb")
            except FileNotFoundError:
                return None
            number = active_number(self.path)
            if self._is_active(handle) and max(sealed_segments(self.path), default=0) < self._next[0]:
                return self._checked(handle, number), False
            handle.close()  # sealed between two looks

    def _is_active(self, handle: BinaryIO) -> bool:
        """Say whether this is still the segment that is written to: a writer may have sealed it meanwhile."""
        try:
            return self.path.stat().st_ino == os.fstat(handle.fileno()).st_ino
        except FileNotFoundError:
            return False

    def _checked(self, handle: BinaryIO, number: int) -> BinaryIO:
        """Meet files that a person removed or cut: go on at what is there, and say so."""
        size = os.fstat(handle.fileno()).st_size
        if self._next[0] != number or self._next[1] > size:
            logger.warning("%s was cut or removed at %s: going on at (%d, 0)", self.path, self._next, number)
            self._next = (number, 0)
        return handle

    def _read_lines(
        self, handle: BinaryIO, sealed: bool, items: list[QueuedTrace], limit: int, room: int
    ) -> tuple[int, bool]:
        """Add lines to `items`; return the room that is left and whether the segment is at its end."""
        number, offset = self._next
        handle.seek(offset)
        for line in handle:
            if not line.endswith(b"\n") and not sealed:
                return room, True
            offset += len(line)
            room -= len(line)
            self._next = (number, offset)
            if line.strip():
                tried = self._next <= self._cursor.intended
                items.append(QueuedTrace.parse(f"{number:010d}:{offset:015d}", line, redelivered=tried))
            if len(items) >= limit or room <= 0:
                return room, False
        return room, True


def _position(id: str) -> Position:
    number, _, offset = id.partition(":")
    return int(number), int(offset)
