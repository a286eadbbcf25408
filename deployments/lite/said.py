"""From tokens to what the client sees: whole characters, the final channel, the end at a stop text.

    token ids, one by one -> Said.add() -> [(part, text), ...]        part is "content" or "reasoning"

gpt-oss writes harmony: `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`.
Only the final channel's text is content; every other one is reasoning, headers are neither.

Ring: pure.
"""

from collections.abc import Callable, Mapping, Sequence

Piece = tuple[str, str]
_PENDING = 4  # tokens: no character is longer in bytes, so what is pending longer is no UTF-8
_MESSAGE, _CHANNEL = "<|message|>", "<|channel|>"
_ENDS = frozenset({"<|start|>", "<|end|>", "<|return|>", "<|call|>", _CHANNEL})
HARMONY = frozenset({_MESSAGE, _CHANNEL, "<|start|>", "<|end|>"})


class Characters:
    """Decodes tokens to whole characters: a Japanese one is often spread over two tokens."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0  # tokens at the front whose text was given out; they stay as left context of the others

    def add(self, token: int) -> str:
        """Return what is whole now."""
        self._ids.append(token)
        before, now = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        if now.endswith("\ufffd") and len(self._ids) - self._shown < _PENDING:
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return now[len(before) :]

    def end(self) -> str:
        """Return what is left, and forget it."""
        before, now = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        self._ids, self._shown = [], 0
        return now[len(before) :]


class Said:
    """One answer. `stopped` says that a stop text was met: nothing after it counts."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], specials: Mapping[int, str], stop: Sequence[str], *, harmony: bool
    ) -> None:
        self.stopped = False
        self._characters = Characters(decode)
        self._specials = specials
        self._stop = stop
        self._keep = max(map(len, stop), default=1) - 1  # so many characters may be the start of a stop text
        self._harmony = harmony
        self._part = "" if harmony else "content"
        self._header = ""
        self._held = ""

    def add(self, token: int) -> list[Piece]:
        """Take a token; return what can be shown now."""
        special = self._specials.get(token)
        if special is None:
            return self._show(self._characters.add(token), is_end=False)
        pieces = self._show(self._characters.end(), is_end=True)
        if self._harmony and special == _MESSAGE:
            self._part = "content" if self._header.split()[:1] == ["final"] else "reasoning"
        elif self._harmony and special in _ENDS:
            self._part = "header" if special == _CHANNEL else ""
            self._header = ""
        return pieces

    def end(self) -> list[Piece]:
        """Return what was held back."""
        return self._show(self._characters.end(), is_end=True)

    def _show(self, text: str, *, is_end: bool) -> list[Piece]:
        if self.stopped:
            return []
        if self._part == "header":
            self._header += text
        if self._part in ("", "header"):
            return []
        text = self._held + text
        shown, self._held = text, ""
        if self._part == "content" and self._stop:
            at = min((place for stop in self._stop if (place := text.find(stop)) >= 0), default=-1)
            if at >= 0:
                self.stopped, shown = True, text[:at]
            elif not is_end and self._keep:
                shown, self._held = text[: -self._keep], text[-self._keep :]
        return [(self._part, shown)] if shown else []
