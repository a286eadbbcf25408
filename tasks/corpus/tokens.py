"""Write a corpus' tokens as they come: memory is bounded by a batch, files appear whole or not at all.

    ids of a piece -> TokenWriter -> tokens.bin (uint16 or uint32), document_ends.bin (int64), little-endian

Ring: edge (disk).  Units: tokens.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tasks import files
from tasks.errors import DataError

TOKENS, ENDS = "tokens.bin", "document_ends.bin"
_FLUSH_TOKENS = 1 << 20


class TokenWriter:
    """Appends documents. Each of several ends with `eos_id`; a single one has no such end."""

    def __init__(self, tokens: BinaryIO, ends: BinaryIO, *, dtype: str, eos_id: int | None) -> None:
        self._files, self._dtype, self._eos_id = (tokens, ends), np.dtype(dtype).newbyteorder("<"), eos_id
        self._ids: list[int] = []
        self._ends: list[int] = []
        self._num_flushed = 0
        self._is_inside = False
        self.num_documents = 0

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return self._num_flushed + len(self._ids)

    def add(self, ids: list[int], *, is_last: bool) -> None:
        """Append a piece of a document, its last one with `is_last`."""
        if not self._is_inside and self.num_documents:
            self._end_document()
        self._ids += ids
        self._is_inside = not is_last
        self.num_documents += is_last
        if len(self._ids) >= _FLUSH_TOKENS:
            self.flush()

    def finish(self) -> int:
        """End the last document; return how many tokens there are."""
        if self.num_documents == 1:
            self._ends.append(self.num_tokens)
        elif self.num_documents:
            self._end_document()
        self.flush()
        return self.num_tokens

    def flush(self) -> None:
        """Hand what waits to the files."""
        np.asarray(self._ids, dtype=self._dtype).tofile(self._files[0])
        np.asarray(self._ends, dtype="<i8").tofile(self._files[1])
        self._num_flushed += len(self._ids)
        self._ids.clear()
        self._ends.clear()

    def _end_document(self) -> None:
        if self._eos_id is None:
            raise DataError(
                "the tokenizer names no eos_token, with which each of several documents ends: set it in its "
                "tokenizer_config.json, or choose another PretrainSpec.tokenizer"
            )
        self._ids.append(self._eos_id)
        self._ends.append(self.num_tokens)


@contextmanager
def writing(folder: Path, *, dtype: str, eos_id: int | None) -> Iterator[TokenWriter]:
    """Yield a writer, to be finished; the two files appear in `folder` when the body ends without an error."""
    with ExitStack() as stack:
        paths = [stack.enter_context(files.aside(folder / name)) for name in (TOKENS, ENDS)]
        tokens, ends = (stack.enter_context(path.open("wb")) for path in paths)
        writer = TokenWriter(tokens, ends, dtype=dtype, eos_id=eos_id)
        yield writer
