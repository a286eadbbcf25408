"""Read the JSON events of an SSE stream whose bytes pass by, cut anywhere.

    bytes -> EventReader.feed() -> take_object() of the shape that this stream has (stream.py, responses_stream.py)

The same bytes give the same events however the network cut them, and nothing that a server sends
raises: what can't be read is counted.

Ring: pure.  Units: bytes.
"""

import json
from abc import ABC, abstractmethod

from tasks.traces.record import Json

MAX_STREAM_BYTES = 64 << 20  # past this an answer is forwarded but no longer remembered


class EventReader(ABC):
    """What both kinds of stream share: lines, events, counts. `done` says that the stream came to its end."""

    def __init__(self, limit_bytes: int = MAX_STREAM_BYTES) -> None:
        self.done = False
        self.error: str | None = None
        self.chunks = 0
        self.malformed = 0
        self._rest: list[bytes] = []  # the line that has no end yet, in pieces
        self._data: list[bytes] = []
        self._room_bytes = limit_bytes
        self._truncated = False

    def feed(self, piece: bytes) -> None:
        """Take the next bytes. Cost: about 5 us per event."""
        if len(piece) > self._room_bytes:
            piece, self._truncated = piece[: self._room_bytes], True
        self._room_bytes -= len(piece)
        first, *others = piece.split(b"\n")
        self._rest.append(first)
        for line in others:
            self._take_line(b"".join(self._rest))
            self._rest = [line]

    def finish(self) -> None:
        """Take what a stream left without its last line end."""
        self._take_line(b"".join(self._rest))
        self._take_line(b"")
        self._rest = []

    def stats(self) -> Json:
        """Count what passed: events, unreadable ones, and whether the stream came to its end."""
        return {"chunks": self.chunks, "malformed": self.malformed, "done": self.done, "truncated": self._truncated}

    @abstractmethod
    def answer(self) -> Json | None:
        """Return the answer so far as one object, or None when no event told of one."""

    def take_end(self) -> None:  # noqa: B027 - most forms need nothing there
        """Take `data: [DONE]`."""

    @abstractmethod
    def take_object(self, event: Json) -> None:
        """Take one event that is a JSON object."""

    def _take_line(self, line: bytes) -> None:
        line = line.removesuffix(b"\r")
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        elif not line and self._data:
            data, self._data = b"\n".join(self._data), []
            self._take_event(data)

    def _take_event(self, data: bytes) -> None:
        if data.strip() == b"[DONE]":
            self.take_end()
            return
        self.chunks += 1
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            event = None
        if isinstance(event, dict):
            self.take_object(event)
        else:
            self.malformed += 1
