"""Dead letters: records that a sink refused, or lines that are no records. List, replay, discard.

    queue.bury() -> P.dead or llm_traces:dead -> list | replay: back into the queue | discard

A replay marks the record (`replayed`), puts it into the queue, and only then takes the letter away. A
crash in between leaves both; the drain asks the sink for a marked record before it sends it, so the
second one adds nothing.

Ring: edge (disk, network).
"""

import fcntl
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import redis

from tasks import files
from tasks.errors import CorruptError
from tasks.traces.record import as_replayed
from tasks.traces.redis_stream import mapped
from tasks.traces.segments import SegmentWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """One dead letter. `id` is the trace's id, or made from the line when that holds none."""

    id: str
    reason: str
    line: bytes
    place: str = ""  # where its store keeps it


class DeadLetters(Protocol):
    """What the commands need of a store of dead letters."""

    def letters(self) -> list[Letter]:
        """Return all letters, oldest first."""
        ...

    def replay(self, ids: Collection[str]) -> int:
        """Put these letters back into the queue; return how many."""
        ...

    def discard(self, ids: Collection[str]) -> int:
        """Remove these letters for good; return how many."""
        ...


def letter_id(line: bytes) -> str:
    """Name a letter by its trace, or by its bytes.

    >>> letter_id(b'{"trace_id":"018b"}'), letter_id(b"torn {")
    ('018b', 'line-94ca70c32dc6')
    """
    try:
        value: Any = json.loads(line)  # Any: whatever the line holds
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and isinstance(value.get("trace_id"), str) and value["trace_id"]:
        return value["trace_id"]
    return f"line-{sha256(line.strip()).hexdigest()[:12]}"


class FileDeadLetters:
    """Letters in P.dead. Safe while a drain buries more: both take the file's lock."""

    def __init__(self, path: Path) -> None:
        self._queue = path.absolute()
        self._path = Path(f"{self._queue}.dead")

    def letters(self) -> list[Letter]:
        """Return all letters, oldest first. A torn last line is left out."""
        if not self._path.exists():
            return []
        return [letter for letter, _ in self._read(self._path.read_bytes()) if letter]

    def replay(self, ids: Collection[str]) -> int:
        """Append these letters to the queue, sync, then take them out of P.dead."""
        with self._locked() as data:
            chosen = [letter for letter, _ in self._read(data) if letter and letter.id in ids]
            if not chosen:
                return 0
            lines = [as_replayed(letter.line) for letter in chosen]
            writer = SegmentWriter(self._queue)
            try:
                writer.append(lines)
                writer.sync()
            finally:
                writer.close()
            self._keep(data, ids)
        return len(chosen)

    def discard(self, ids: Collection[str]) -> int:
        """Remove these letters from P.dead."""
        with self._locked() as data:
            count = sum(letter is not None and letter.id in ids for letter, _ in self._read(data))
            if count:
                self._keep(data, ids)
        return count

    def _keep(self, data: bytes, gone: Collection[str]) -> None:
        kept = [raw for letter, raw in self._read(data) if letter is None or letter.id not in gone]
        files.write_bytes(self._path, b"".join(kept))

    @contextmanager
    def _locked(self) -> Iterator[bytes]:
        """Hold the lock that a writer of P.dead takes, and yield what is in the file."""
        while True:
            try:
                handle = self._path.open("rb")
            except FileNotFoundError:
                yield b""
                return
            with handle:
                fcntl.flock(handle, fcntl.LOCK_EX)
                if self._path.stat().st_ino == os.fstat(handle.fileno()).st_ino:  # else it was just replaced
                    yield handle.read()
                    return

    def _read(self, data: bytes) -> Iterator[tuple[Letter | None, bytes]]:
        for raw in data.splitlines(keepends=True):
            try:
                value = json.loads(raw)
                line = value["line"].encode("utf-8", "surrogatepass") + b"\n"
                yield Letter(id=letter_id(line), reason=str(value["reason"]), line=line), raw
            except (ValueError, KeyError, TypeError, AttributeError):
                yield None, raw


class RedisDeadLetters:
    """Letters in the stream `<stream>:dead`; a replay is one transaction."""

    def __init__(self, client: redis.Redis, stream: str) -> None:
        self._redis, self._stream = client, stream

    def letters(self) -> list[Letter]:
        """Return all letters, oldest first."""
        with mapped():
            entries: Any = self._redis.xrange(f"{self._stream}:dead")  # Any: redis-py types replies loosely
        found = []
        for place, fields in entries:
            line, reason = fields.get(b"record", b""), fields.get(b"reason", b"").decode(errors="replace")
            found.append(Letter(id=letter_id(line), reason=reason, line=line, place=place.decode()))
        return found

    def replay(self, ids: Collection[str]) -> int:
        """Move these letters back into the stream."""
        chosen = [letter for letter in self.letters() if letter.id in ids]
        lines = [as_replayed(letter.line) for letter in chosen]
        with mapped(), self._redis.pipeline(transaction=True) as pipe:
            for letter, line in zip(chosen, lines, strict=True):
                pipe.xadd(self._stream, {b"record": line})
                pipe.xdel(f"{self._stream}:dead", letter.place)
            pipe.execute()
        return len(chosen)

    def discard(self, ids: Collection[str]) -> int:
        """Remove these letters."""
        chosen = [letter for letter in self.letters() if letter.id in ids]
        if chosen:
            with mapped():
                self._redis.xdel(f"{self._stream}:dead", *(letter.place for letter in chosen))
        return len(chosen)


def is_replayable(letter: Letter) -> bool:
    """Say whether a letter is a JSON object: a torn line would only be buried again."""
    try:
        as_replayed(letter.line)
    except CorruptError:
        return False
    return True
