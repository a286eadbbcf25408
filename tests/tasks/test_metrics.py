"""metrics.jsonl survives a writer that was killed in the middle of a line."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tasks import metrics as subject

RECORDS = [{"step": step, "loss": 4.0 / step, "text": "損失\u2028"} for step in range(1, 6)]


def _write(path: Path, torn: str = "") -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS) + torn)
    return path


def test_torn_last_line_is_left_out(tmp_path: Path):
    assert subject.read_metrics(_write(tmp_path / "m.jsonl", torn='{"step": 6, "lo')) == RECORDS
    assert subject.read_metrics(tmp_path / "none.jsonl") == []


def test_records_after_the_checkpoint_are_dropped(tmp_path: Path):
    path = _write(tmp_path / "m.jsonl", torn='{"step": 6, "lo')
    subject.truncate_metrics(path, 3)
    assert subject.read_metrics(path) == RECORDS[:3]
    with path.open("a") as handle:
        handle.write(json.dumps({"step": 4}) + "\n")
    assert [record["step"] for record in subject.read_metrics(path)] == [1, 2, 3, 4]


def test_truncating_nothing_makes_an_empty_file(tmp_path: Path):
    subject.truncate_metrics(tmp_path / "new.jsonl", 3)
    assert (tmp_path / "new.jsonl").read_text() == ""


@given(st.integers(0, 400))
def test_any_cut_leaves_a_prefix_of_the_records(tmp_path_factory, cut: int):
    path = _write(tmp_path_factory.mktemp("m") / "m.jsonl")
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    found = subject.read_metrics(path)
    assert found == RECORDS[: len(found)]
    whole = data[:cut].count(b"\n")
    assert len(found) in (whole, whole + 1)  # a record without its line end may be whole already
