"""Cutting keeps every character, and a cut text gives the tokens of the uncut one."""

from pathlib import Path

import pytest
from hypothesis import given
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
    assert "".join(piece.text for piece in found) == (whole[len(whole) - sum(len(p.text) for p in found) :])
    assert bool(found) is bool(whole.strip())
    lost = whole[: len(whole) - sum(len(piece.text) for piece in found)]
    assert not lost.strip()  # only blanks at the beginning, where they fill whole pieces
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


@given(texts, st.integers(1, 20))
def test_wherever_it_is_cut(tokenizer: Tokenizer, text: str, size: int):
    if len(text) > size and not text[:size].strip():
        return  # blanks at the beginning are dropped then
    expected = tokenizer.encode(text, add_special_tokens=False).ids if text.strip() else []
    assert ids_of(tokenizer, [text], size) == expected


def test_a_tokenizer_that_marks_the_beginning_of_a_text_sees_it_whole():
    """Metaspace puts a mark before the first word of whatever it is given: no cut is clean."""
    words = {f"▁{word}": number for number, word in enumerate(["one", "two", "three"])}
    marking = Tokenizer(models.WordLevel({**words, "[UNK]": 9}, unk_token="[UNK]"))
    marking.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    pieces = [Piece("one", "x", False), Piece(" two", "x", False), Piece(" three", "x", True), Piece("one", "y", True)]
    found = list(encode(pieces, marking))
    assert [(piece.where, ids) for piece, ids in found] == [("x", [0, 1, 2]), ("y", [0])]


def test_control_tokens_in_a_text_are_text(tokenizer: Tokenizer):
    text = "a<|eos|>b"
    [(_, ids)] = encode([Piece(text, "x", True)], tokenizer)
    assert tokenizer.token_to_id("<|eos|>") not in ids
    assert tokenizer.decode(ids) == text
