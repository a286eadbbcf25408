"""The shipped sentences are as many, as short and as different as their card says."""

import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "data" / "short_english"
SENTENCES = (FOLDER / "sentences.txt").read_text(encoding="utf-8").splitlines()


def test_there_are_500_and_none_twice():
    assert len(SENTENCES) == 500
    assert len({re.sub(r"\W", "", sentence).lower() for sentence in SENTENCES}) == 500


def test_each_is_a_short_plain_sentence():
    for sentence in SENTENCES:
        assert 4 <= len(sentence.split()) <= 12, sentence
        assert re.fullmatch(r"[A-Z][A-Za-z0-9,' ]*[.?]", sentence), sentence
        assert "  " not in sentence, sentence


def test_the_card_says_what_is_there():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card and "path: sentences.txt" in card
    said = re.search(r"about ([\d,]+) words", card)
    assert said is not None
    assert abs(int(said[1].replace(",", "")) - sum(len(sentence.split()) for sentence in SENTENCES)) < 100
