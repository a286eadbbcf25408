"""Withhold the token counts that the gateway asked for and the client did not.

    bytes of an SSE stream, cut anywhere -> UsageFilter.feed() -> the same without the usage-only event

With `stream_options.include_usage` vLLM sends one more event at the end: no choices, the counts. All
other bytes pass as they are; what comes in whole events, as vLLM sends them, passes without delay.

Ring: pure.  Units: bytes.
"""

import json

_ENDS = (b"\n\n", b"\r\n\r\n")
_LONGEST_HELD = 256 << 10  # an event longer than this holds more than token counts


class UsageFilter:
    """One stream's filter."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, piece: bytes) -> bytes:
        """Take the next bytes; return what may go on: whole events."""
        if self._held:
            piece = self._held + piece
            self._held = b""
        if not piece.endswith(_ENDS):
            end = max((at + len(mark) for mark in _ENDS if (at := piece.rfind(mark)) >= 0), default=0)
            if len(piece) - end <= _LONGEST_HELD:
                self._held, piece = piece[end:], piece[:end]
        return _without_usage(piece) if b'"usage"' in piece else piece

    def flush(self) -> bytes:
        """Return what is still held: the stream ended inside an event."""
        held, self._held = self._held, b""
        return held


def _without_usage(piece: bytes) -> bytes:
    line_end = b"\r\n\r\n" if b"\r\n\r\n" in piece else b"\n\n"
    kept: list[bytes] = []
    lead = b""  # line ends of an empty event before the counts, when the bytes were cut among them
    for event in piece.split(line_end):
        if b'"usage"' in event and _is_usage_only(event):
            lead += event[: len(event) - len(event.lstrip(b"\r\n"))]
        else:
            kept.append(lead + event)
            lead = b""
    return line_end.join(kept) + lead


def _is_usage_only(event: bytes) -> bool:
    """Say whether an event holds token counts and no choice.

    >>> _is_usage_only(b'data: {"choices":[],"usage":{"total_tokens":8}}')
    True
    >>> _is_usage_only(b'data: {"choices":[{"index":0}],"usage":null}')
    False
    """
    lines = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
    try:
        value = json.loads(b"\n".join(lines))
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.get("choices") == [] and isinstance(value.get("usage"), dict)
