"""What a person wants to know of a tokenised corpus: counted document by document, shown as Markdown.

Ring: pure.  Units: tokens, bytes of UTF-8.
"""

from collections import Counter
from typing import Any

import numpy as np

from tasks.artifacts import TokenizedCorpus
from tasks.corpus.pieces import Piece

_SHOWN_DOCUMENTS = 3
_SHOWN_TOKENS = 60
_BAR = 40  # characters
_PERCENTILES = (1, 10, 25, 50, 75, 90, 99)


class Statistics:
    """Counts of a corpus; memory grows with the number of distinct lengths, not of documents.

    >>> said = Statistics(num_ids=8)
    >>> for text, ids in (("ab", [1, 2]), ("abc", [1, 2, 3]), ("a", [1])):
    ...     _ = said.add(Piece(text, "x:1", is_last=True), ids)
    >>> said.num_documents, said.values()["lengths"]["50"], said.values()["num_used_ids"]
    (3, 2, 3)
    """

    def __init__(self, num_ids: int) -> None:
        self.num_documents = self.num_tokens = self.num_bytes = 0
        self.samples: list[list[int]] = []
        self._is_used = np.zeros(num_ids, dtype=bool)
        self._lengths: Counter[int] = Counter()
        self._open: list[int] = []  # the first tokens of the document that is being read
        self._length = 0

    def add(self, piece: Piece, ids: list[int]) -> int:
        """Count a piece; return its document's length when it ends here, else 0."""
        self.num_tokens += len(ids)
        self.num_bytes += len(piece.text.encode())
        self._is_used[ids] = True
        self._length += len(ids)
        if len(self.samples) < _SHOWN_DOCUMENTS:
            self._open = (self._open + ids[:_SHOWN_TOKENS])[:_SHOWN_TOKENS]
        if not piece.is_last:
            return 0
        if len(self.samples) < _SHOWN_DOCUMENTS:
            self.samples.append(self._open)
        length, self._length, self._open = self._length, 0, []
        self._lengths[length] += 1
        self.num_documents += 1
        return length

    def values(self) -> dict[str, Any]:  # Any: JSON values
        """Return the counts as a manifest keeps them; lengths without the token that ends a document."""
        return {
            "num_bytes": self.num_bytes,
            "num_text_tokens": self.num_tokens,
            "num_used_ids": int(self._is_used.sum()),
            "lengths": percentiles(self._lengths),
            "histogram": histogram(self._lengths),
        }


def percentiles(lengths: Counter[int]) -> dict[str, int]:
    """Return shortest, percentiles and longest by name: the smallest length that so many per cent don't exceed.

    >>> percentiles(Counter({1: 1, 5: 1, 9: 2}))
    {'shortest': 1, '1': 1, '10': 1, '25': 1, '50': 5, '75': 9, '90': 9, '99': 9, 'longest': 9}
    """
    values, counts = np.array(sorted(lengths)), np.array([lengths[value] for value in sorted(lengths)])
    at = np.searchsorted(np.cumsum(counts) * 100, np.array(_PERCENTILES) * counts.sum())
    named = {str(percent): int(values[i]) for percent, i in zip(_PERCENTILES, at, strict=True)}
    return {"shortest": int(values[0]), **named, "longest": int(values[-1])}


def histogram(lengths: Counter[int]) -> dict[str, int]:
    """Return documents by length in powers of two, as "from-to".

    >>> histogram(Counter({1: 1, 5: 1, 7: 2}))
    {'1': 1, '4-7': 3}
    """
    by_power: Counter[int] = Counter()
    for length, count in lengths.items():
        by_power[length.bit_length()] += count
    names = {power: _range(power) for power in by_power}
    return {names[power]: by_power[power] for power in sorted(by_power)}


def _range(power: int) -> str:
    return str(power) if power < 2 else f"{1 << (power - 1)}-{(1 << power) - 1}"


def corpus_markdown(corpus: TokenizedCorpus, about: dict[str, Any]) -> str:  # Any: manifest values
    """Return what a corpus holds, with three of its documents cut where their tokens end."""
    found = about["statistics"]
    lengths = found["lengths"]
    most = max(found["histogram"].values())
    lines = [
        f"# Corpus {corpus.source}",
        "",
        f"At `{corpus.pins['corpus'][:16]}`, tokenizer {about['tokenizer']}, in `{corpus.folder}`.",
        "",
        "| | |",
        "|---|---:|",
        f"| documents | {corpus.num_documents:,} |",
        f"| tokens, with {about['eos_token'] or 'nothing'} behind each document | {corpus.num_tokens:,} |"
        if corpus.num_documents > 1
        else f"| tokens | {corpus.num_tokens:,} |",
        f"| ids that occur, of {corpus.vocab_size:,} | {found['num_used_ids']:,} |",
        f"| bytes per token | {found['num_bytes'] / max(1, found['num_text_tokens']):.2f} |",
        f"| text | {found['num_bytes'] / 1e6:,.2f} MB |",
        f"| stored as | {corpus.dtype} |",
        "",
        "Tokens in a document: " + ", ".join(f"{_name(key)} {value:,}" for key, value in lengths.items()) + ".",
        "",
        "```text",
        *(
            f"{tokens:>15} {'#' * max(1, round(_BAR * count / most))} {count:,}"
            for tokens, count in found["histogram"].items()
        ),
        "```",
        "",
        "The first documents; `|` is where a token ends:",
        "",
    ]
    for sample in about["samples"]:
        lines += ["````text", sample, "````", ""]
    return "\n".join(lines)


def _name(key: str) -> str:
    return f"{key} %" if key.isdecimal() else key
