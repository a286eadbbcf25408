"""Put a streamed answer back together while its bytes pass by.

    bytes of an SSE stream, cut anywhere -> StreamAssembler.feed() -> answer() in OpenAI's shape

The same bytes give the same answer however the network cut them, and nothing that a server sends
raises: what can't be read is counted.

Ring: pure.  Units: bytes.
"""

from typing import Any

from tasks.traces.record import Json
from tasks.traces.sse import MAX_STREAM_BYTES, EventReader

_WHOLE_OBJECT = {"chat.completion.chunk": "chat.completion"}
_SET_ONCE = frozenset({"role", "id", "type", "name"})  # every other text of a delta is a piece to append


class StreamAssembler(EventReader):
    """Collects the events of one SSE stream; `done` turns true with `data: [DONE]`."""

    def __init__(self, limit_bytes: int = MAX_STREAM_BYTES) -> None:
        super().__init__(limit_bytes)
        self._top: Json = {}
        self._choices: dict[int, Json] = {}

    def answer(self) -> Json | None:
        """Return the answer so far as one OpenAI object, or None when no event could be read."""
        if not self._top and not self._choices:
            return None
        return self._top | {"choices": [_joined(self._choices[index]) for index in sorted(self._choices)]}

    def take_end(self) -> None:
        """See EventReader."""
        self.done = True

    def take_object(self, event: Json) -> None:
        """Add one chunk to the answer."""
        if event.get("error"):
            error = event["error"]
            self.error = str(error.get("message", error)) if isinstance(error, dict) else str(error)
        choices = event.get("choices")
        for name, value in event.items():
            if name not in ("choices", "error") and value is not None:
                self._top[name] = value
        kind = self._top.get("object")
        if isinstance(kind, str):
            self._top["object"] = _WHOLE_OBJECT.get(kind, kind)
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                index = choice.get("index", 0)
                self._take_choice(index if isinstance(index, int) else 0, choice)

    def _take_choice(self, index: int, choice: Json) -> None:
        kept = self._choices.setdefault(index, {"index": index})
        for name, value in choice.items():
            if name == "delta" and isinstance(value, dict):
                _merge(kept.setdefault("message", {}), value)
            elif name == "text" and isinstance(value, str):
                _append(kept, "text", value)
            elif name == "logprobs" and isinstance(value, dict):
                _extend_lists(kept, value)
            elif name not in ("index", "delta", "message") and value is not None:
                kept[name] = value


def _merge(message: Json, delta: Json) -> None:
    """Add one delta to a message; pieces of text gather in lists that `_joined` makes whole."""
    for name, value in delta.items():
        if isinstance(value, str) and name not in _SET_ONCE:
            _append(message, name, value)
        elif name == "tool_calls" and isinstance(value, list):
            _merge_calls(message, value)
        elif isinstance(value, dict):
            _merge(_child(message, name), value)
        elif value is not None:
            message.setdefault(name, value) if name in _SET_ONCE else message.update({name: value})
        else:
            message.setdefault(name, None)


def _child(message: Json, name: str) -> Json:
    if not isinstance(message.get(name), dict):
        message[name] = {}
    return message[name]


def _merge_calls(message: Json, calls: list[Any]) -> None:  # Any: whatever the server sent
    kept = message.get("tool_calls")
    if not isinstance(kept, _Calls):
        kept = message["tool_calls"] = _Calls()
    for call in calls:
        if isinstance(call, dict):
            index = call.get("index", 0)
            _merge(kept.setdefault(index if isinstance(index, int) else 0, {}), call)


class _Calls(dict[int, Json]):
    """Tool calls by their index, until they become a list."""


class _Pieces(list[str]):
    """Pieces of one text, joined once at the end: appending to a str would cost time squared."""


def _append(target: Json, name: str, piece: str) -> None:
    kept = target.get(name)
    if not isinstance(kept, _Pieces):
        kept = target[name] = _Pieces()
    kept.append(piece)


def _extend_lists(choice: Json, logprobs: Json) -> None:
    kept = choice.get("logprobs")
    if not isinstance(kept, dict):
        kept = choice["logprobs"] = {}
    for name, value in logprobs.items():
        if isinstance(value, list):
            if not isinstance(kept.get(name), list):
                kept[name] = []
            kept[name].extend(value)
        else:
            kept[name] = value


def _joined(value: Any) -> Any:  # Any: walks a JSON value
    if isinstance(value, _Pieces):
        return "".join(value)
    if isinstance(value, _Calls):
        return [_joined(value[index]) for index in sorted(value)]
    if isinstance(value, dict):
        return {name: _joined(item) for name, item in value.items()}
    return value
