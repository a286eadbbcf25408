"""Cutting keeps every character, and a cut text gives the tokens of the uncut one."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from tasks.corpus import pieces as subject
from tasks.corpus.encode import encode
from tasks.corpus.pieces import Piece
from tasks.corpus.tokenizer import train_bpe

ROOT = Path(__file__).resolve().parents[3]
CORPUS = (ROOT / "data" / "ja_culture" / "corpus.txt").read_text(encoding="utf-8")
SENTENCES = (ROOT / "data" / "short_english" / "sentences.txt").read_text(encoding="utf-8")
texts = st.text(alphabet="ab é祭。、'’_-/<|>1 \n\t", max_size=80)


@given(st.lists(texts, max_size=6), st.integers(1, 40))
def test_pieces_are_the_blocks_cut_elsewhere(blocks: list[str], size: int):
    found = list(subject.cut_blocks(blocks, "x", size))
    whole = "".join(blocks)
    is_document = bool(whole.strip()) or len(whole) > size
    assert "".join(piece.text for piece in found) == (whole if is_document else "")
    assert bool(found) is is_document
    assert [piece.is_last for piece in found] == [False] * (len(found) - 1) + [True] * bool(found)
    assert all(len(piece.text) <= size for piece in found)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([SENTENCES, CORPUS], 2000)


def ids_of(tokenizer: Tokenizer, blocks: list[str], size: int) -> list[int]:
    return [i for _, ids in encode(subject.cut_blocks(blocks, "x", size), tokenizer) for i in ids]


@pytest.mark.parametrize("size", [100, 1000, 30_000])
@pytest.mark.parametrize("text", [CORPUS, SENTENCES, SENTENCES.replace("\n", " ")], ids=["ja", "en", "one line"])
def test_a_cut_text_has_the_tokens_of_the_uncut_one(tokenizer: Tokenizer, text: str, size: int):
    assert ids_of(tokenizer, [text], size) == tokenizer.encode(text, add_special_tokens=False).ids


@given(st.lists(texts, max_size=6).map("".join), st.integers(40, 60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_wherever_it_is_cut(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, text: str, size: int):
    """A piece is never short, as in life: what stands on both sides of a cut tells whether it is clean."""
    monkeypatch.setattr(subject, "_TAIL_CHARS", 8)
    is_document = text.strip() or len(text) > size
    expected = tokenizer.encode(text, add_special_tokens=False).ids if is_document else []
    assert ids_of(tokenizer, [text], size) == expected


def test_a_tokenizer_that_marks_the_beginning_of_a_text_sees_it_whole():
    """Metaspace puts a mark before the first word of whatever it is given: no cut is clean."""
    words = {"▁on": 0, "▁e": 1, "▁one": 2}
    marking = Tokenizer(models.WordLevel({**words, "[UNK]": 9}, unk_token="[UNK]"))
    marking.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    pieces = [Piece("on", "x", False), Piece("e", "x", True), Piece("on", "y", True)]
    found = list(encode(pieces, marking))
    assert [(piece.where, ids) for piece, ids in found] == [("x", [2]), ("y", [0])]


def test_control_tokens_in_a_text_are_text(tokenizer: Tokenizer):
    text = "a<|eos|>b"
    [(_, ids)] = encode([Piece(text, "x", True)], tokenizer)
    assert tokenizer.token_to_id("<|eos|>") not in ids
    assert tokenizer.decode(ids) == text
