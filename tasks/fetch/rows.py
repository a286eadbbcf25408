"""Turn one source row into a Conversation, or say why not.

Ring: pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from hashlib import sha256
from itertools import pairwise
from typing import Any

from tasks.errors import DataError
from tasks.specs import FetchSpec

ROLES = ("system", "developer", "user", "assistant")
Message = dict[str, str]
Row = dict[str, Any]  # Any: whatever the source holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """One row of a source: what will be learnt, or the reason why not. `row_id` is where a person finds it."""

    split: str
    row_id: str
    row: Row = field(default_factory=dict)
    reason: str = ""


class RejectedRowError(DataError):
    """One row that can't be learnt from; the reason is the message."""


def required_columns(spec: FetchSpec) -> tuple[str, ...]:
    """Return the columns that a source must have.

    >>> required_columns(FetchSpec(source="x.csv", question_column="q", answer_column="a"))
    ('q', 'a')
    """
    if spec.text_column:
        return (spec.text_column,)
    if spec.question_column:
        return (spec.question_column, spec.answer_column)
    return (spec.messages_column,)


def require_columns(names: Sequence[str], spec: FetchSpec, doing: str) -> None:
    """Raise DataError when a table has no column of the name that is asked for.

    >>> require_columns(["id", "text"], FetchSpec(source="x/y", text_column="txt"), "data set x/y")
    Traceback (most recent call last):
    ...
    tasks.errors.DataError: data set x/y has no column 'txt': did you mean text? It has id, text
    """
    for wanted in required_columns(spec):
        if wanted not in names:
            near = ", ".join(get_close_matches(wanted, names, n=2, cutoff=0.5))
            hint = f"did you mean {near}? It" if near else "it"
            texts = (
                "" if spec.text_column else "; for plain text name its column in FetchSpec.text_column (TEXT_COLUMN)"
            )
            raise DataError(f"{doing} has no column {wanted!r}: {hint} has {', '.join(names)}{texts}")


def read_row(row: dict[str, Any], spec: FetchSpec) -> dict[str, Any]:  # Any: whatever the source holds
    """Return {"text": ...} or {"messages": [...]} of one row. Raises RejectedRowError with the reason.

    >>> read_row({"q": "何?", "a": "祭り"}, FetchSpec(source="x.csv", question_column="q", answer_column="a"))
    {'messages': [{'role': 'user', 'content': '何?'}, {'role': 'assistant', 'content': '祭り'}]}
    """
    missing = [name for name in required_columns(spec) if name not in row]
    if missing:
        raise RejectedRowError(f"no column {missing[0]!r}; the row has {', '.join(map(str, row)) or 'none'}")
    if spec.text_column:
        return {"text": _text(row[spec.text_column], spec.text_column)}
    if spec.question_column:
        return {"messages": _question_answer(row, spec)}
    return {"messages": _messages(row[spec.messages_column])}


def _question_answer(row: dict[str, Any], spec: FetchSpec) -> list[Message]:  # Any: whatever the source holds
    question = _text(row[spec.question_column], spec.question_column)
    answer = _text(row[spec.answer_column], spec.answer_column)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(value: Any, name: str) -> str:  # Any: whatever the source holds
    if not isinstance(value, str):
        raise RejectedRowError(f"{name} is {type(value).__name__}, expected text")
    if not value.strip():
        raise RejectedRowError(f"{name} is empty")
    return value


def _messages(value: Any) -> list[Message]:  # Any: whatever the source holds
    if not isinstance(value, list) or not value:
        raise RejectedRowError("messages is not a list of {role, content}" if value else "messages is empty")
    messages = [_message(index, item) for index, item in enumerate(value)]
    roles = [message["role"] for message in messages if message["role"] not in ("system", "developer")]
    if not roles or roles[0] != "user":
        raise RejectedRowError("the chat does not begin with a user message")
    if roles[-1] != "assistant":
        raise RejectedRowError("the chat has no answer: its last message is not the assistant's")
    if any(first == second for first, second in pairwise(roles)):
        raise RejectedRowError("user and assistant do not alternate")
    return messages


def _message(index: int, item: Any) -> Message:  # Any: whatever the source holds
    if not isinstance(item, dict) or "role" not in item or "content" not in item:
        raise RejectedRowError(f"message {index} is not {{role, content}}")
    if item["role"] not in ROLES:
        raise RejectedRowError(f"message {index} has role {item['role']!r}, expected one of {', '.join(ROLES)}")
    return {"role": item["role"], "content": _text(item["content"], f"message {index}")}


def is_validation_row(row: dict[str, Any], validation_pct: float) -> bool:  # Any: JSON values
    """Decide by content which side a row falls on: stable when rows are added, moved or run again.

    >>> is_validation_row({"text": "a"}, 0.0), is_validation_row({"text": "a"}, 100.0)
    (False, True)
    """
    point = int.from_bytes(sha256(repr(row).encode()).digest()[:4], "big") / 2**32
    return point * 100 < validation_pct
