r"""Cut long documents, so that a text of any length is tokenised in bounded memory.

    blocks of characters -> cut_blocks() -> Piece, Piece, ... of about PIECE_CHARS

A tokenizer must not see the cut: pieces end where byte-level BPE splits words anyway, and whoever
encodes them compares both sides of each cut with the uncut text and joins pieces that differ.

Ring: pure.  Units: characters.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PIECE_CHARS = 1 << 17
_TAIL_CHARS = 1 << 14  # a cut is looked for in the last ones of a piece
_LINE_START = re.compile(r"(?<=\n)(?=[^\W_])")
_WORD_END = re.compile(r"(?<=[^\W_])(?=[^\w\s'’]| [^\W_])")


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of one. `where` is what a person looks up: file, file:line or split:row."""

    text: str
    where: str
    is_last: bool


def cut_blocks(blocks: Iterable[str], where: str, size: int = PIECE_CHARS) -> Iterator[Piece]:
    r"""Yield the pieces of one document, which comes in blocks; nothing when it is short and blank.

    >>> [piece.text for piece in cut_blocks(["one\ntwo\nthr", "ee\n"], "x", size=6)]
    ['one\n', 'two\n', 'three\n']
    >>> list(cut_blocks(["\n", " "], "x"))
    []
    """
    waiting, has_begun = "", False
    for block in blocks:
        waiting += block
        while len(waiting) > size:
            end = find_cut(waiting, size)
            yield Piece(waiting[:end], where, is_last=False)
            waiting, has_begun = waiting[end:], True
    if has_begun or waiting.strip():
        yield Piece(waiting, where, is_last=True)


def find_cut(text: str, size: int) -> int:
    r"""Return where to cut so that the first part has at most `size` characters: at a line, else at a word.

    >>> find_cut("ab\ncd ef", 5), find_cut("ab cd ef", 6), find_cut("abcdef", 4)
    (3, 5, 4)
    """
    begin = max(1, size - _TAIL_CHARS)
    for pattern in (_LINE_START, _WORD_END):
        found = [match.start() for match in pattern.finditer(text, begin, size + 2) if match.start() <= size]
        if found:
            return found[-1]
    return size
