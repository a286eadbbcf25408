"""Data rows in the data sets of a store: found by id, by hash or by text.

    dataset/<key>/{train,validation}.parquet, rejected.jsonl -> FoundRow

A row's hash is the sha256 of its content, so the same row of two data sets has one.

Ring: edge (disk; pyarrow).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from deployments.provenance.lineage import Node
from tasks import files

SPLITS = ("train", "validation")
_HASH = re.compile(r"[0-9a-f]{12,64}")
_LEAST_CHARS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRow:
    """One row. `split` is train, validation or rejected; a rejected row has a reason and no content."""

    dataset: str
    split: str
    row_id: str
    content: str = ""
    reason: str = ""

    @property
    def hash(self) -> str:
        """sha256 of the content; empty for a rejected row."""
        return sha256(self.content.encode()).hexdigest() if self.content else ""


def find_rows(dataset: Node, wanted: str) -> list[FoundRow]:
    """Return the rows that `wanted` names: exactly their id, else the first digits of their hash, else their text.

    Text is looked for in every message, from four characters on.
    """
    by_id = [row for split in SPLITS for row in _by_id(dataset, split, wanted)]
    by_id += [row for row in _rejected(dataset) if row.row_id == wanted]
    if by_id or len(wanted) < _LEAST_CHARS:
        return by_id
    is_hash = _HASH.fullmatch(wanted) is not None
    return [
        row
        for split in SPLITS
        for row in _all(dataset, split)
        if (row.hash.startswith(wanted) if is_hash else wanted in _said(row.content))
    ]


def row_ids(dataset: Node, split: str) -> list[str]:
    """Return the ids of a split's rows; none when the file is gone."""
    path = Path(dataset.folder) / f"{split}.parquet"
    return _read(path, ["row_id"])["row_id"].to_pylist() if path.is_file() else []


def _by_id(dataset: Node, split: str, wanted: str) -> Iterator[FoundRow]:
    """Read the ids first: content only when one of them is meant."""
    if wanted in row_ids(dataset, split):
        yield from (row for row in _all(dataset, split) if row.row_id == wanted)


def _all(dataset: Node, split: str) -> Iterator[FoundRow]:
    path = Path(dataset.folder) / f"{split}.parquet"
    if not path.is_file():
        return
    for row in _read(path, None).to_pylist():
        content = {name: value for name, value in row.items() if name != "row_id"}
        text = json.dumps(content, ensure_ascii=False, sort_keys=True)
        yield FoundRow(dataset=dataset.ref, split=split, row_id=row["row_id"], content=text)


def _rejected(dataset: Node) -> Iterator[FoundRow]:
    path = Path(dataset.folder) / "rejected.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        row = json.loads(line)
        yield FoundRow(dataset=dataset.ref, split="rejected", row_id=row["row_id"], reason=row["reason"])


def _said(content: str) -> str:
    """Return what a row says, its messages one after the other."""
    row = json.loads(content)
    return "\n".join(str(message["content"]) for message in row["messages"]) if "messages" in row else row["text"]


def _read(path: Path, columns: list[str] | None) -> Any:  # Any: pyarrow's tables are untyped
    import pyarrow.parquet as pq  # 0.2 s: only a question about rows pays it

    return pq.read_table(path, columns=columns)


def read_run(root: Path, run_id: str) -> dict[str, Any] | None:  # Any: JSON values
    """Return the recipe that a flow run stored, None when it is not there."""
    path = root / "runs" / run_id / "recipe.json"
    return files.read_json(path) if re.fullmatch(r"[\w-]+", run_id) and path.is_file() else None
