"""Put a streamed answer of `/v1/responses` back together while its bytes pass by.

    bytes of an SSE stream, cut anywhere -> ResponsesAssembler.feed() -> answer() as one Response object

The last event holds the whole answer (`response.completed`, `response.incomplete`, `response.failed`); that is
kept as it is. For a stream that was cut the first event's response is filled with the text deltas so far.

Ring: pure.  Units: bytes.
"""

from typing import Any

from tasks.traces.record import Json
from tasks.traces.sse import MAX_STREAM_BYTES, EventReader

_LAST = frozenset({"response.completed", "response.incomplete", "response.failed"})
_TEXT, _REASONING = "response.output_text.delta", "response.reasoning_text.delta"


class ResponsesAssembler(EventReader):
    """Collects the events of one stream; `done` turns true with the event that holds the whole answer."""

    def __init__(self, limit_bytes: int = MAX_STREAM_BYTES) -> None:
        super().__init__(limit_bytes)
        self._response: Json | None = None
        self._texts: dict[tuple[int, str], list[str]] = {}

    def answer(self) -> Json | None:
        """Return the whole answer, or what there is of it; None when no event told of one."""
        if self.done or (self._response is None and not self._texts):
            return self._response
        output = [
            {"type": kind, "content": [{"type": f"{_PART[kind]}", "text": "".join(texts)}]}
            for (_, kind), texts in sorted(self._texts.items())
        ]
        return (self._response or {"object": "response"}) | {"output": output}

    def take_object(self, event: Json) -> None:
        """Keep the answer that an event holds, or its piece of text."""
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
