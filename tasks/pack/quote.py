"""Keep what a person wrote text, also where it looks like a control token.

    contents --hide--> template --> rendered text with placeholders --encode--> ids

A tokenizer turns each `<|return|>` of a rendered chat into its one id, whoever wrote it. vLLM's
harmony renderer does not: it encodes contents as ordinary text. So contents go through the template
with placeholders, the text between the template's own control tokens gets them back, and is then
encoded without control tokens. transformers' `sanitize_control_tokens` encodes a hidden token apart
from its neighbours and so gives other ids than harmony: " <|" is one token there.

Ring: pure (the tokenizer is an argument).
"""

import re
from typing import Any, Protocol

from tasks.errors import DataError

Message = dict[str, str]
_MARKS = range(0xF0000, 0xFFFFE)  # a private-use plane


class Encoder(Protocol):
    """What is used of transformers' tokenizer."""

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:  # Any: AddedToken
        """Tokens beside the learnt vocabulary, by id."""
        ...

    def __call__(self, text: list[str], **kwargs: Any) -> Any:  # Any: transformers' signature
        """Tokenise a batch of texts."""
        ...


class Quotes:
    """Hides control tokens of some texts and encodes what was rendered from them."""

    def __init__(self, tokenizer: Encoder, texts: list[str]) -> None:
        self._tokenizer = tokenizer
        self._ids = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._names = {id_: name for name, id_ in self._ids.items()}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._mark = next(chr(code) for code in _MARKS if not any(chr(code) in text for text in texts))
        self._hidden = re.compile(f"{self._mark}(\\d+){self._mark}")

    def hide(self, messages: list[Message]) -> list[Message]:
        """Return the messages with a placeholder for each control token in their contents."""
        return [
            {**message, "content": self._control.sub(self._placeholder, message["content"])} for message in messages
        ]

    def encode(self, rendered: list[str], row_ids: list[str]) -> list[list[int]]:
        """Return the ids of rendered chats. Raises DataError where the tokenizer can't tell text from token."""
        encoded = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return [
            self._with_text(text, ids, row_id) if self._mark in text else ids
            for text, ids, row_id in zip(rendered, encoded, row_ids, strict=True)
        ]

    def _placeholder(self, found: re.Match[str]) -> str:
        return f"{self._mark}{self._ids[found[0]]}{self._mark}"

    def _with_text(self, rendered: str, ids: list[int], row_id: str) -> list[int]:
        pieces = self._control.split(rendered)  # text, control token, text, ..., text
        if self._joined(pieces) != ids:  # cutting changes ids (SentencePiece marks a text's start)
            names = ", ".join(sorted({self._names[int(number)] for number in self._hidden.findall(rendered)}))
            raise DataError(
                f"row {row_id}: it holds the text of a control token ({names}), which this tokenizer can't encode as "
                "text: leave the row out, or write the token in another way"
            )
        return self._joined([self._hidden.sub(lambda found: self._names[int(found[1])], piece) for piece in pieces])

    def _joined(self, pieces: list[str]) -> list[int]:
        texts = self._tokenizer(pieces[::2], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        controls = [[self._ids[name]] for name in pieces[1::2]]
        return [id_ for text, control in zip(texts, [*controls, []], strict=True) for id_ in (*text, *control)]
