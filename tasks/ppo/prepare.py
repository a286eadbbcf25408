"""Prepare questions for verl: the shipped ones, files, or a Hub data set > train.parquet, test.parquet.

    QuestionsSpec -> tables.py -> questions.py -> parquet, rejected.jsonl

Ring: edge.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi

from tasks import files
from tasks.artifacts import ArtifactStore, PreparedQuestions, make_key
from tasks.errors import DataError, MissingError, TransientError
from tasks.hub import pin_commit
from tasks.ppo.questions import RejectedQuestionError, read_question
from tasks.specs import QuestionsSpec
from tasks.tables import TABLE_SUFFIXES, HubRows, Row, read_file, read_hub

VERSION = 1
SHIPPED = Path(__file__).resolve().parents[2] / "data" / "word_problems"
_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [("split", pa.string()), ("index", pa.int64()), ("answer", pa.string()), ("question", pa.string())]
            ),
        ),
    ]
)
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Sorted:
    """Rows by split, and what could not be used."""

    rows: dict[str, list[Row]] = field(default_factory=lambda: {"train": [], "test": []})
    rejected: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    @property
    def total(self) -> int:
        return sum(map(len, self.rows.values())) + len(self.rejected)


def prepare_questions(spec: QuestionsSpec, store: ArtifactStore, hub: HfApi) -> PreparedQuestions:
    """Write verl's parquet files; a second call returns the finished ones.

    Raises: MissingError, DataError (no rows, bad rows), AccessError, TransientError.
    """
    pins = pin_questions(spec, hub)
    key = questions_key(spec, pins)
    with store.claim(PreparedQuestions, key) as claim:
        if claim.found:
            return claim.found
        found = _sort(spec, hub, pins)
        if "commit" not in pins and pin_questions(spec, hub) != pins:
            raise TransientError(f"{spec.source} changed while it was read: it is read again")
        _refuse_bad(spec, found)
        for split, rows in found.rows.items():
            with files.aside(claim.folder / f"{split}.parquet") as path:
                pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), path)
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in found.rejected)
        files.write_text(claim.folder / "rejected.jsonl", "".join(lines))
        artifact = PreparedQuestions(
            key=key,
            folder=str(claim.folder),
            source=spec.source,
            revision=next(iter(pins.values())),
            num_train_rows=len(found.rows["train"]),
            num_test_rows=len(found.rows["test"]),
            num_rejected_rows=len(found.rejected),
        )
        return claim.commit(artifact, spec=spec, about={"pins": pins, "sample": found.rows["train"][0]})


def questions_key(spec: QuestionsSpec, pins: dict[str, str]) -> str:
    """Return the key of the questions that a source means."""
    return make_key("prepare-questions", VERSION, spec, pins)


def pin_questions(spec: QuestionsSpec, hub: HfApi) -> dict[str, str]:
    """Return what the source's name means right now: digests of files, or the commit of a Hub data set."""
    paths = _paths(spec)
    if not paths:
        return {"commit": pin_commit(hub, spec.source, spec.revision, "dataset")}
    for path in paths.values():
        if not path.is_file():
            raise MissingError(f"QuestionsSpec.source: there is no file {path}; name one, or a Hub data set owner/name")
    return {name: files.digest(path) for name, path in paths.items()}


def _paths(spec: QuestionsSpec) -> dict[str, Path]:
    """Return the files that are read, by split; none for a Hub data set."""
    if spec.source == "shipped":
        return {split: SHIPPED / f"{split}.jsonl" for split in ("train", "test")}
    if not spec.source.endswith(TABLE_SUFFIXES):
        return {}
    named = {"train": spec.source, **({"test": spec.test_source} if spec.test_source else {})}
    return {split: Path(name).expanduser().resolve() for split, name in named.items()}


def _sort(spec: QuestionsSpec, hub: HfApi, pins: dict[str, str]) -> _Sorted:
    found = _Sorted()
    paths = _paths(spec)
    splits_itself = len(paths) == 1
    for split in paths or ("train", "test"):
        for index, (where, row) in enumerate(_read(spec, split, paths, hub, pins)):
            side = "test" if splits_itself and _is_test_row(row, spec) else split
            try:
                if isinstance(row, str):
                    raise RejectedQuestionError(row)
                found.rows[side].append(read_question(row, spec, side, index))
            except RejectedQuestionError as error:
                found.rejected.append({"split": side, "row_id": where, "reason": str(error)})
    return found


def _read(
    spec: QuestionsSpec, split: str, paths: dict[str, Path], hub: HfApi, pins: dict[str, str]
) -> Iterator[tuple[str, Row | str]]:
    columns = (spec.question_column, spec.answer_column)
    if paths:
        rows = read_file(paths[split], columns)
    else:
        wanted = HubRows(
            repo_id=spec.source,
            config=spec.config,
            split=spec.split if split == "train" else spec.test_split,
            commit=pins["commit"],
            is_stream=spec.max_rows > 0,
            knob="QuestionsSpec.source",
            columns=columns,
        )
        rows = read_hub(wanted, hub)
    return islice(rows, spec.max_rows or None)


def _is_test_row(row: Any, spec: QuestionsSpec) -> bool:  # Any: row values
    """Decide by content which side a row falls on: stable when rows are added, moved or run again."""
    point = int.from_bytes(sha256(repr(row).encode()).digest()[:4], "big") / 2**32
    return point * 100 < spec.test_pct


def _refuse_bad(spec: QuestionsSpec, found: _Sorted) -> None:
    if not found.total:
        raise DataError(f"questions {spec.source}: empty, expected at least one row")
    if 100 * len(found.rejected) / found.total > spec.max_rejected_pct:
        shown = "; ".join(f"{line['row_id']}: {line['reason']}" for line in found.rejected[:3])
        raise DataError(
            f"questions {spec.source}: {len(found.rejected)} of {found.total} rows can't be asked ({shown}): mend "
            f"them, or raise QuestionsSpec.max_rejected_pct (now {spec.max_rejected_pct:g}) to leave them out"
        )
    lacking = [split for split, rows in found.rows.items() if not rows]
    if lacking:
        raise DataError(
            f"questions {spec.source}: no {lacking[0]} rows ({found.total} in all): name QuestionsSpec.test_source, or "
            "change test_pct"
        )
