"""Each row becomes a chat or a text, or is rejected for a reason that a person can act on."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import DataError
from tasks.fetch import rows as subject
from tasks.specs import FetchSpec

CHAT = FetchSpec(source="x.jsonl")
COLUMNS = FetchSpec(source="x.csv", question_column="q", answer_column="a")
TEXT = FetchSpec(source="x.jsonl", text_column="body")
words = st.text(min_size=1).filter(lambda text: bool(text.strip()))


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@given(st.lists(st.tuples(words, words), min_size=1, max_size=4), st.sampled_from([None, "system", "developer"]))
def test_whole_chats_come_out_as_they_went_in(pairs: list[tuple[str, str]], lead: str | None):
    messages = [_message(lead, "rules")] if lead else []
    for question, answer in pairs:
        messages += [_message("user", question), _message("assistant", answer)]
    noisy = [{**message, "name": "dropped"} for message in messages]
    assert subject.read_row({"messages": noisy, "id": 7}, CHAT) == {"messages": messages}


@given(words, words)
def test_two_columns_make_one_turn(question: str, answer: str):
    assert subject.read_row({"q": question, "a": answer, "z": 1}, COLUMNS) == {
        "messages": [_message("user", question), _message("assistant", answer)]
    }


@given(words)
def test_text_is_kept(text: str):
    assert subject.read_row({"body": text}, TEXT) == {"text": text}


@pytest.mark.parametrize(
    ("row", "spec", "reason"),
    [
        ({"text": "x", "id": 1}, CHAT, r"no column 'messages'; the row has text, id"),
        ({}, CHAT, "no column 'messages'; the row has none"),
        ({"q": "x"}, COLUMNS, "no column 'a'; the row has q"),
        ({"q": "x", "a": "  "}, COLUMNS, "a is empty"),
        ({"q": "x", "a": None}, COLUMNS, "a is NoneType, expected text"),
        ({"q": 3, "a": "x"}, COLUMNS, "q is int, expected text"),
        ({"body": ""}, TEXT, "body is empty"),
        ({"messages": []}, CHAT, "messages is empty"),
        ({"messages": "hello"}, CHAT, "messages is not a list of {role, content}"),
        ({"messages": ["hello"]}, CHAT, "message 0 is not {role, content}"),
        ({"messages": [{"role": "user"}]}, CHAT, "message 0 is not {role, content}"),
        (
            {"messages": [_message("bot", "x")]},
            CHAT,
            "message 0 has role 'bot', expected one of system, developer, user",
        ),
        (
            {"messages": [_message("user", "x")]},
            CHAT,
            "the chat has no answer: its last message is not the assistant's",
        ),
        ({"messages": [_message("user", "x"), _message("assistant", "")]}, CHAT, "message 1 is empty"),
        ({"messages": [_message("assistant", "x")]}, CHAT, "does not begin with a user message"),
        ({"messages": [_message("system", "x")]}, CHAT, "does not begin with a user message"),
        (
            {"messages": [_message("user", "x"), _message("user", "y"), _message("assistant", "z")]},
            CHAT,
            "user and assistant do not alternate",
        ),
    ],
)
def test_bad_row_is_rejected_with_the_reason(row: dict[str, Any], spec: FetchSpec, reason: str):
    with pytest.raises(subject.RejectedRowError, match=reason):
        subject.read_row(row, spec)


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=9)), st.floats(0, 100), st.floats(0, 100))
def test_split_is_monotone_in_the_share(row: dict[str, str], one: float, other: float):
    low, high = sorted((one, other))
    assert subject.is_validation_row(row, low) <= subject.is_validation_row(row, high)
    assert not subject.is_validation_row(row, 0.0)
    assert subject.is_validation_row(row, 100.0)


def test_split_takes_about_its_share():
    held_out = sum(subject.is_validation_row({"text": f"row {index}"}, 20.0) for index in range(5000))
    assert 900 < held_out < 1100


def test_a_table_of_texts_taken_for_chats_is_told_where_texts_are_named():
    with pytest.raises(DataError, match=r"has text; for plain text name its column in FetchSpec\.text_column \(TEXT_"):
        subject.require_columns(["text"], CHAT, "x/y")
