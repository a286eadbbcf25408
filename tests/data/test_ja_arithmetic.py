"""The shipped sums: every answer is right, every question there once, the file what its program writes."""

import csv
import importlib.util
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from tasks.artifacts import ArtifactStore
from tasks.fetch.run import fetch_dataset
from tasks.specs import FetchSpec

FOLDER = Path(__file__).resolve().parents[2] / "data" / "ja_arithmetic"
FILE = FOLDER / "ja_arithmetic_q_dataset.csv"


def _rows() -> list[dict[str, str]]:
    with FILE.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_every_answer_is_right():
    for row in _rows():
        first, second = map(int, re.findall(r"\d", row["question"]))
        is_sum = any(word in row["question"] for word in ("たす", "足す", "もらいました"))
        assert is_sum != any(word in row["question"] for word in ("ひく", "引く", "食べました")), row
        assert int(row["answer"]) == (first + second if is_sum else first - second) >= 0, row


def test_every_question_is_there_once_and_the_card_counts_them():
    rows = _rows()
    assert len({row["question"] for row in rows}) == len(rows) == 378
    assert f"{len(rows)} small sums" in (FOLDER / "README.md").read_text()


def test_the_file_is_what_its_program_writes(tmp_path: Path):
    spec = importlib.util.spec_from_file_location("ja_arithmetic_make", FOLDER / "make.py")
    assert spec and spec.loader
    made: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    made.FILE = tmp_path / "again.csv"
    made.main()
    assert made.FILE.read_bytes() == FILE.read_bytes()


def test_it_is_fetched_by_its_name(tmp_path: Path):
    wanted = FetchSpec(source="shipped:ja_arithmetic", question_column="question", answer_column="answer")
    dataset = fetch_dataset(wanted, ArtifactStore(tmp_path), HfApi(token=False))
    assert dataset.num_train_rows + dataset.num_validation_rows == 378 and dataset.num_validation_rows >= 8
