"""What a pretraining step reads: windows of the corpus, or whole documents without padding.

    tokens.bin, document_ends.bin -> TokenFile -> what is learnt, what is held out
                                  -> Windows | DocumentRows -> collate() -> a batch

Ring: edge (reads the token file).  Shapes: B rows, T tokens of a row, N tokens of all rows of a pass.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from tasks.errors import SpecError
from tasks.gptoss.head import NOT_LEARNT
from tasks.specs import PretrainSpec

Batch = dict[str, torch.Tensor]
_HELD_OUT_ROWS = 512  # rows that a held-out loss is the mean of, at most


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

    def cut(self, spec: PretrainSpec) -> tuple["TokenFile", "TokenFile"]:
        """Return what is learnt, and what is held out: the corpus' end, from the start of a document on.

        A document is cut where it would double the share: a single one, or one that is much of the corpus.
        Raises: SpecError when one of the two holds too little.
        """
        total = len(self.ids_N)
        if not spec.validation_pct:
            return self, TokenFile(ids_N=self.ids_N[:0], ends_D=self.ends_D[:0])
        place = round(total * (1 - spec.validation_pct / 100))
        begun = int(max(self.ends_D[self.ends_D <= place], default=0))
        place = begun if total - begun <= 2 * (total - place) else place
        least = spec.row_tokens if spec.rows == "windows" else 2
        if place < least or total - place < least:
            raise SpecError(
                f"PretrainSpec.validation_pct = {spec.validation_pct:g} of {len(self.ends_D):,} documents leaves "
                f"{place:,} tokens to learn and holds out {total - place:,}, expected {least:,} or more of each: "
                "change it, or give a larger corpus"
            )
        ends_D = np.append(self.ends_D[self.ends_D < place], place)
        rest_D = self.ends_D[self.ends_D > place] - place
        return TokenFile(ids_N=self.ids_N[:place], ends_D=ends_D), TokenFile(ids_N=self.ids_N[place:], ends_D=rest_D)


class Windows(Dataset[torch.Tensor]):
    """Windows of T tokens."""

    def __init__(self, corpus: TokenFile, row_tokens: int, starts: torch.Tensor) -> None:
        self.corpus, self.row_tokens, self.starts = corpus, row_tokens, starts

    @classmethod
    def drawn(cls, corpus: TokenFile, spec: PretrainSpec) -> "Windows":
        """Return those of a run, at positions drawn once from the seed; item i is always the same."""
        draw = torch.Generator().manual_seed(spec.seed)
        num_rows = spec.num_steps * spec.rows_per_step
        last = max(1, len(corpus.ids_N) - spec.row_tokens)
        return cls(corpus, spec.row_tokens, torch.randint(0, last, (num_rows,), generator=draw))

    @classmethod
    def in_line(cls, corpus: TokenFile, row_tokens: int) -> "Windows":
        """Return those that lie one behind the other; what is left at the end is in none."""
        return cls(corpus, row_tokens, torch.arange(0, len(corpus.ids_N) - row_tokens + 1, row_tokens))

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
    return Windows.drawn(corpus, spec) if spec.rows == "windows" else DocumentRows(corpus, spec)


def open_held_out(corpus: TokenFile, spec: PretrainSpec) -> Subset[torch.Tensor]:
    """Return rows of what is held out, spread over all of it when there are many."""
    rows = Windows.in_line(corpus, spec.row_tokens) if spec.rows == "windows" else DocumentRows(corpus, spec)
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), _HELD_OUT_ROWS)).round().astype(int)
    return Subset(rows, chosen.tolist())


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
