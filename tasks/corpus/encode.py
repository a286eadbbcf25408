"""Pieces of text to ids, in batches; where a document was cut, its ids are those of the uncut text.

Ring: edge (runs the tokenizer).
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from tasks.corpus.pieces import PIECE_CHARS, Piece
from tasks.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BATCH_PIECES = 1000
_TRIAL_CHARS = 256  # on each side of a cut
_BATCH_CHARS = 4 * PIECE_CHARS
_MAX_CHARS = 256 * PIECE_CHARS


def encode(pieces: Iterable[Piece], tokenizer: "Tokenizer") -> Iterator[tuple[Piece, list[int]]]:
    """Yield each piece with its ids, no special token added; a control token in the text is text.

    Raises: DataError for a document that can't be tokenised in parts and is too long to be tokenised at once.
    Cost: about 100 bytes of memory for each token of a batch of half a million characters.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    for batch in _batches(join_where_cuts_show(pieces, tokenizer)):
        encoded = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        yield from zip(batch, (encoding.ids for encoding in encoded), strict=True)


def join_where_cuts_show(pieces: Iterable[Piece], tokenizer: "Tokenizer") -> Iterator[Piece]:
    """Yield the pieces; two of a document that are other tokens together than apart become one."""
    held: Piece | None = None
    for piece in pieces:
        if held is None or held.is_last or _is_clean(held.text, piece.text, tokenizer):
            if held is not None:
                yield held
            held = piece
            continue
        held = Piece(held.text + piece.text, piece.where, piece.is_last)
        if len(held.text) > _MAX_CHARS:
            raise DataError(
                f"{held.where}: this tokenizer gives other tokens when a document is cut, and this one has more than "
                f"{_MAX_CHARS:,} characters: split it, or set PretrainSpec.documents='lines'"
            )
    if held is not None:
        yield held


def _is_clean(left: str, right: str, tokenizer: "Tokenizer") -> bool:
    """Say whether a cut changes nothing, from what lies close to it: words end before."""
    left, right = left[-_TRIAL_CHARS:], right[:_TRIAL_CHARS]
    both, *apart = tokenizer.encode_batch_fast([left + right, left, right], add_special_tokens=False)
    return both.ids == [*apart[0].ids, *apart[1].ids]


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    num_chars = 0
    for piece in pieces:
        batch.append(piece)
        num_chars += len(piece.text)
        if num_chars >= _BATCH_CHARS or len(batch) == _BATCH_PIECES:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
