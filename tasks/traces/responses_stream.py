"""Put a streamed answer of `/v1/responses` back together while its bytes pass by.

    bytes of an SSE stream, cut anywhere -> ResponsesAssembler.feed() -> answer() as one Response object

The last event holds the whole answer (`response.completed`, `response.incomplete`, `response.failed`); that is
kept as it is. For a stream that was cut the first event's response is filled with the text deltas so far.

Ring: pure.  Units: bytes.
"""

import json
from typing import Any

from tasks.traces.record import Json

MAX_STREAM_BYTES = 64 << 20  # past this an answer is forwarded but no longer remembered
_LAST = frozenset({"response.completed", "response.incomplete", "response.failed"})
_TEXT, _REASONING = "response.output_text.delta", "response.reasoning_text.delta"


class ResponsesAssembler:
    """Collects the events of one stream; `done` turns true with the event that holds the whole answer."""

    def __init__(self, limit_bytes: int = MAX_STREAM_BYTES) -> None:
        self.done = False
        self.error: str | None = None
        self.chunks = 0
        self.malformed = 0
        self._rest: list[bytes] = []  # the line that has no end yet, in pieces
        self._data: list[bytes] = []
        self._response: Json | None = None
        self._texts: dict[tuple[int, str], list[str]] = {}
        self._room_bytes = limit_bytes
        self._truncated = False

    def feed(self, piece: bytes) -> None:
        """Take the next bytes."""
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

    def answer(self) -> Json | None:
        """Return the whole answer, or what there is of it; None when no event told of one."""
        if self.done or (self._response is None and not self._texts):
            return self._response
        output = [
            {"type": kind, "content": [{"type": f"{_PART[kind]}", "text": "".join(texts)}]}
            for (_, kind), texts in sorted(self._texts.items())
        ]
        return (self._response or {"object": "response"}) | {"output": output}

    def _take_line(self, line: bytes) -> None:
        line = line.removesuffix(b"\r")
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        elif not line and self._data:
            data, self._data = b"\n".join(self._data), []
            self._take_event(data)

    def _take_event(self, data: bytes) -> None:
        if data.strip() == b"[DONE]":
            return
        self.chunks += 1
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict):
            self.malformed += 1
            return
        self._take_object(event)

    def _take_object(self, event: Json) -> None:
        kind, response = str(event.get("type")), event.get("response")
        if isinstance(response, dict) and not self.done:
            self._response = response
            self.done = kind in _LAST
            if self.done and response.get("error"):
                self.error = _message(response["error"])
        elif kind == "error" or event.get("error"):
            self.error = _message(event.get("error") or event)
        elif kind in (_TEXT, _REASONING) and isinstance(event.get("delta"), str):
            index = event.get("output_index")
            place = (index if isinstance(index, int) else 0, "message" if kind == _TEXT else "reasoning")
            self._texts.setdefault(place, []).append(event["delta"])


_PART = {"message": "output_text", "reasoning": "reasoning_text"}


def _message(error: Any) -> str:  # Any: whatever the server sent
    return str(error.get("message") or error) if isinstance(error, dict) else str(error)
