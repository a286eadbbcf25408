"""The shipped data is large enough, well formed, without repeats, and its split is clean."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "data" / "ja_culture"
CHATS = {
    split: [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    for split in ("train", "validation")
}
ROWS = [row for rows in CHATS.values() for row in rows]


def _plain(text: str) -> str:
    return re.sub(r"[\s。、？?！!「」『』]", "", text)


def test_there_are_enough_chats_on_many_topics():
    assert len(ROWS) >= 400
    assert len(CHATS["validation"]) >= 40
    topics = {row["topic"] for row in ROWS}
    assert topics >= {"festivals", "food", "crafts", "etiquette", "history", "language", "nature"}
    assert {row["topic"] for row in CHATS["validation"]} == topics  # each is learnt and asked for


@pytest.mark.parametrize("split", CHATS)
def test_each_row_is_a_chat_in_japanese(split: str):
    for row in CHATS[split]:
        assert set(row) == {"id", "topic", "messages"}, row["id"]
        assert row["id"].startswith(row["topic"]), row["id"]
        messages = row["messages"]
        assert len(messages) % 2 == 0 and messages, row["id"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2), row["id"]
        for message in messages:
            assert set(message) == {"role", "content"}, row["id"]
            text = message["content"]
            assert 4 <= len(text) <= 600 and text == text.strip() and "\ufffd" not in text, row["id"]
            assert re.search("[ぁ-ん]", text), row["id"]


def test_nothing_is_asked_or_answered_twice():
    ids = [row["id"] for row in ROWS]
    questions = [_plain(row["messages"][0]["content"]) for row in ROWS]
    answers = [_plain(row["messages"][1]["content"]) for row in ROWS]
    for values in (ids, questions, answers):
        assert sorted(set(values)) == sorted(values)


def test_validation_is_not_in_train():
    sides = {split: {_plain(row["messages"][0]["content"]) for row in rows} for split, rows in CHATS.items()}
    assert not sides["train"] & sides["validation"]
    said = {split: {_plain(row["messages"][1]["content"]) for row in rows} for split, rows in CHATS.items()}
    assert not said["train"] & said["validation"]


def test_corpus_is_text_in_documents():
    text = (FOLDER / "corpus.txt").read_text(encoding="utf-8")
    documents = [part for part in text.split("\n\n") if part.strip()]
    assert len(documents) >= 100 and len(text) >= 50_000
    assert len(set(documents)) == len(documents)
    assert "\ufffd" not in text and "\r" not in text
