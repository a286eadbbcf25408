"""What a pretraining step reads: windows of the corpus, or whole documents without padding.

    tokens.bin, document_ends.bin -> TokenFile -> Windows | DocumentRows -> collate() -> a batch

Ring: edge (reads the token file).  Shapes: B rows, T tokens of a row, N tokens of all rows of a pass.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tasks.gptoss.head import NOT_LEARNT
from tasks.specs import PretrainSpec

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFile:
    """A corpus as ids, mapped and not read: what a run touches comes from the disk."""

    ids_N: np.ndarray
    ends_D: np.ndarray  # where each document ends, exclusive

    @classmethod
    def open(cls, folder: Path, dtype: str) -> "TokenFile":
        """Map `tokens.bin` and `document_ends.bin` of a corpus artifact."""
        ids_N = np.memmap(folder / "tokens.bin", dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
        ends_D = np.fromfile(folder / "document_ends.bin", dtype="<i8")
        return cls(ids_N=ids_N, ends_D=ends_D)

    def read(self, start: int, end: int) -> torch.Tensor:
        """Return ids as int64."""
        return torch.from_numpy(self.ids_N[start:end].astype(np.int64))


class Windows(Dataset[torch.Tensor]):
    """Fixed windows of T tokens at positions drawn once from the seed; item i is always the same."""

    def __init__(self, corpus: TokenFile, spec: PretrainSpec) -> None:
        self.corpus, self.row_tokens = corpus, spec.row_tokens
        draw = torch.Generator().manual_seed(spec.seed)
        num_rows = spec.num_steps * spec.rows_per_step
        last = max(1, len(corpus.ids_N) - spec.row_tokens)
        self.starts = torch.randint(0, last, (num_rows,), generator=draw)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> torch.Tensor:
        start = int(self.starts[index])
        return self.corpus.read(start, start + self.row_tokens)

    @property
    def lengths(self) -> int:
        """T: all rows are as long."""
        return self.row_tokens


class DocumentRows(Dataset[torch.Tensor]):
    """Each document a row; one of more than T tokens is cut into several. A row of one token has no next to learn."""

    def __init__(self, corpus: TokenFile, spec: PretrainSpec) -> None:
        self.corpus = corpus
        begins_D = np.concatenate(([0], corpus.ends_D[:-1]))
        parts_D = -(-(corpus.ends_D - begins_D) // spec.row_tokens)
        document_R = np.repeat(np.arange(len(parts_D)), parts_D)
        part_R = np.arange(len(document_R)) - np.repeat(np.cumsum(parts_D) - parts_D, parts_D)
        starts_R = begins_D[document_R] + part_R * spec.row_tokens
        lengths_R = np.minimum(corpus.ends_D[document_R] - starts_R, spec.row_tokens)
        self.starts, self.lengths = starts_R[lengths_R > 1], lengths_R[lengths_R > 1]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> torch.Tensor:
        start = int(self.starts[index])
        return self.corpus.read(start, start + int(self.lengths[index]))


def open_rows(corpus: TokenFile, spec: PretrainSpec) -> Windows | DocumentRows:
    """Return the rows that a spec asks for."""
    return Windows(corpus, spec) if spec.rows == "windows" else DocumentRows(corpus, spec)


def collate(rows: list[torch.Tensor]) -> Batch:
    """Return a pass: rows of one length as (B, T), others one behind the other as (1, N); positions tell them apart.

    >>> batch = collate([torch.tensor([5, 6, 7]), torch.tensor([8, 9])])
    >>> batch["position_ids"].tolist(), batch["labels"].tolist()
    ([[0, 1, 2, 0, 1]], [[-100, 6, 7, -100, 9]])
    """
    is_even = len({len(row) for row in rows}) == 1
    join: Any = torch.stack if is_even else _in_one_row  # Any: two functions of other names for the same argument
    labels = [torch.cat((torch.tensor([NOT_LEARNT]), row[1:])) for row in rows]
    return {
        "input_ids": join(rows),
        "position_ids": join([torch.arange(len(row)) for row in rows]),
        "labels": join(labels),
    }


def _in_one_row(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(rows)[None]
