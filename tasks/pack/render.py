"""Render a conversation to token ids and labels, turn by turn, the way the server will see it.

    messages[:i] + generation prompt -> prompt_ids      what vLLM puts in front of the model
    messages[:i+1]                   -> full_ids        the same, with the answer
    labels = [-100] * len(prompt) + full_ids[len(prompt):]

Each assistant turn is one document. So exactly the tokens that a server will ask the model for
are learnt, `<|channel|>final<|message|>` and the closing `<|return|>` included, and never the
`<|end|>` with which the gpt-oss template closes an earlier answer: vLLM does not stop on it.
A template that rewrites the prompt once the answer is known is refused: what is learnt must
follow from what is asked. Text that looks like a control token stays text where the server keeps it
text: in every message of gpt-oss, in the answers of others, whose prompts vLLM reads as one text.

Ring: pure (the tokenizer is an argument).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any, Protocol

from jinja2.exceptions import TemplateError

from tasks.errors import DataError
from tasks.pack.quote import Quotes
from tasks.specs import PackSpec

IGNORE = -100
_INSTRUCTIONS_END = re.compile(r"""(?P<kept>\{\{- developer_message \}\}\s*)\{\{- "\\n\\n" \}\}""")
_CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")
Message = dict[str, str]


class Tokenizer(Protocol):
    """What is used of transformers' tokenizer."""

    eos_token_id: int | None
    chat_template: str

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:  # Any: AddedToken
        """Tokens beside the learnt vocabulary, by id."""
        ...

    def apply_chat_template(self, conversation: list[Message], **kwargs: Any) -> Any:  # Any: transformers' signature
        """Render a chat to text."""
        ...

    def __call__(self, text: list[str], **kwargs: Any) -> Any:  # Any: transformers' signature
        """Tokenise a batch of texts."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One learnable unit. Lengths: prompt_ids (P), answer_ids (A); the row holds P + A tokens."""

    row_id: str
    prompt_ids: list[int]
    answer_ids: list[int]

    @property
    def input_ids(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt_ids + self.answer_ids

    @property
    def num_tokens(self) -> int:
        """P + A."""
        return len(self.prompt_ids) + len(self.answer_ids)


def pin_date(template: str, prompt_date: str) -> str:
    """Return a chat template whose calls of `strftime_now("...")` are replaced by that date's text.

    >>> pin_date('Current date: {{ strftime_now("%Y/%m/%d") }}', "2025-08-05")
    "Current date: {{ '2025/08/05' }}"
    """
    day = date.fromisoformat(prompt_date)
    return _CLOCK.sub(lambda call: repr(day.strftime(call["format"])), template)


def as_served(template: str) -> str:
    """Return gpt-oss's template with the developer message closed as vLLM's harmony renderer closes it.

    The published template puts two line ends after the instructions even when no tools follow; the
    server does not, and a model tuned on the one would be asked the other. Other templates are
    returned as they are.
    """
    return _INSTRUCTIONS_END.sub(lambda match: match["kept"] + '{{- "\\n\\n" if tools else "" }}', template)


def turns(messages: list[Message], system_prompt: str) -> Iterator[tuple[list[Message], list[Message]]]:
    """Yield (what is asked, what is asked plus the answer) for each assistant turn.

    >>> chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    >>> [(len(asked), len(answered)) for asked, answered in turns(chat * 2, "")]
    [(1, 2), (3, 4)]
    """
    if system_prompt and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system_prompt}, *messages]
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            yield messages[:index], messages[: index + 1]


def render_chats(rows: list[dict[str, Any]], tokenizer: Tokenizer, spec: PackSpec) -> list[Document]:  # Any: row values
    """Render every assistant turn of every row.

    Args:
        rows: {"row_id", "messages"}.
        tokenizer: with a chat template.
        spec: system prompt and pinned date are used here.
    Raises: DataError naming the row when the template refuses it or does not keep its own prompt as a prefix.
    """
    template = as_served(pin_date(tokenizer.chat_template, spec.prompt_date))
    contents = [message["content"] for row in rows for message in row["messages"]]
    quotes = Quotes(tokenizer, [spec.system_prompt, *contents])
    ids: list[str] = []
    prompts: list[str] = []
    fulls: list[str] = []
    for row in rows:
        for asked, answered in turns(row["messages"], spec.system_prompt):
            plain = quotes.hide(answered if is_harmony(template) else answered[-1:])
            hidden = [*answered[: len(answered) - len(plain)], *plain]
            if hidden != answered:
                _render(row["row_id"], tokenizer, template, answered)  # the template may refuse what it would not see
            ids.append(row["row_id"])
            prompts.append(
                _render(row["row_id"], tokenizer, template, hidden[: len(asked)], add_generation_prompt=True)
            )
            fulls.append(_render(row["row_id"], tokenizer, template, hidden))
    if not ids:
        return []
    encoded = zip(ids, quotes.encode(prompts, ids), quotes.encode(fulls, ids), strict=True)
    return [_document(*columns) for columns in encoded]


def is_harmony(template: str) -> bool:
    """Say whether a template writes harmony, which vLLM renders itself, content by content.

    >>> is_harmony("<|start|>{{ m.role }}<|channel|>final<|message|>"), is_harmony("<|im_start|>{{ m.role }}")
    (True, False)
    """
    return "<|channel|>" in template and "<|message|>" in template


def _render(row_id: str, tokenizer: Tokenizer, template: str, messages: list[Message], **options: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **options)
    except TemplateError as error:
        raise DataError(f"row {row_id}: the chat template refuses it: {error.message}") from error


def _document(row_id: str, prompt: list[int], full: list[int]) -> Document:
    if full[: len(prompt)] != prompt or len(full) == len(prompt):
        raise DataError(
            f"row {row_id}: the chat template does not keep the rendered prompt ({len(prompt)} tokens) in front of the "
            f"answer ({len(full)} tokens in all): use a template whose answers only append"
        )
    return Document(row_id=row_id, prompt_ids=prompt, answer_ids=full[len(prompt) :])


def render_texts(rows: list[dict[str, Any]], tokenizer: Tokenizer) -> list[Document]:  # Any: row values
    """Tokenise plain texts, each closed by the end token; every token is learnt."""
    if not rows:
        return []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer([row["text"] for row in rows], add_special_tokens=False)["input_ids"]
    return [
        Document(row_id=row["row_id"], prompt_ids=[], answer_ids=[*ids, *end])
        for row, ids in zip(rows, encoded, strict=True)
    ]


def labels_of(document: Document, loss_on: str) -> list[int]:
    """Return labels (P + A): -100 where nothing is learnt.

    >>> labels_of(Document(row_id="r", prompt_ids=[1, 2], answer_ids=[3]), "assistant")
    [-100, -100, 3]
    """
    if loss_on == "all":
        return document.input_ids
    return [IGNORE] * len(document.prompt_ids) + document.answer_ids


def fit_context(documents: list[Document], spec: PackSpec) -> tuple[list[Document], list[Document]]:
    """Return (documents that fit a row, documents that do not). Raises DataError when too_long is 'error'."""
    too_long = [document for document in documents if document.num_tokens > spec.row_tokens]
    if too_long and spec.too_long == "error":
        worst = max(too_long, key=lambda document: document.num_tokens)
        raise too_long_error(worst.row_id, worst.num_tokens, len(too_long), len(documents), spec)
    return [document for document in documents if document.num_tokens <= spec.row_tokens], too_long


def too_long_error(row_id: str, num_tokens: int, num_too_long: int, num_documents: int, spec: PackSpec) -> DataError:
    """Return the error that names the longest of the documents that exceed a row, and the ways out."""
    return DataError(
        f"{num_too_long} of {num_documents} documents are longer than a row: {row_id} has {num_tokens} tokens but a "
        f"row holds {spec.row_tokens}: raise PackSpec.row_tokens, shorten them, or set PackSpec.too_long to 'drop'"
    )
