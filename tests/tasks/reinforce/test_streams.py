"""metrics.csv and generations.csv after kills: what is whole stays, what is torn or done again goes."""

import csv
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import SpecError
from tasks.reinforce.run import check_rewards
from tasks.reinforce.streams import CsvStream, parse_rows, read_rows
from tasks.specs import ReinforceSpec, RewardSpec

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=6), cut=st.integers(0, 400))
def test_however_it_is_torn_whole_rows_are_read_and_a_resume_has_each_step_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], cut: int
):
    path = tmp_path_factory.mktemp("stream") / "g.csv"
    stream = CsvStream(path, ("step", "text"))
    stream.cut(0)
    for step, text in enumerate(texts, start=1):
        stream.append([{"step": step, "text": text}])
    whole = path.read_bytes()
    path.write_bytes(whole[: max(11, len(whole) - cut)])  # the header is written whole or not at all
    found = read_rows(path)
    assert [row["text"] for row in found] == texts[: len(found)]
    kept = len(found) // 2
    stream.cut(kept)
    for step, text in enumerate(texts[kept:], start=kept + 1):
        stream.append([{"step": step, "text": text}])
    assert path.read_bytes() == whole
    with path.open(newline="", encoding="utf-8") as handle:  # as a spreadsheet would read it
        assert [row["text"] for row in csv.DictReader(handle)] == texts


def test_other_columns_begin_a_new_file(tmp_path: Path):
    CsvStream(tmp_path / "m.csv", ("step", "old")).append([{"step": 1, "old": 2}])
    (tmp_path / "m.csv").write_text("step,old\r\n1,2\r\n")
    CsvStream(tmp_path / "m.csv", ("step", "new")).cut(5)
    assert (tmp_path / "m.csv").read_text() == "step,new\n"


def test_a_piece_without_its_header_is_read_with_its_columns():
    data = b'3,"a ""b"""\r\n4,torn'
    assert parse_rows(data, ["step", "text"]) == ([{"step": "3", "text": 'a "b"'}], 13)


def test_what_is_no_record_is_left_out():
    data = b"step,text\r\n1,a\r\nlone\rreturn\r\n\r\n2,b\r\n"
    assert [row["step"] for row in parse_rows(data)[0]] == ["1", "2"]
    assert parse_rows(b"no,header\r\n1,a\r\n")[0] == []


def test_a_completion_of_any_length_is_read(tmp_path: Path):
    stream = CsvStream(tmp_path / "generations.csv", ("step", "completion"))
    stream.cut(0)
    stream.append([{"step": 1, "completion": "x" * 200_000}])
    assert len(read_rows(stream.path)[0]["completion"]) == 200_000


@pytest.mark.parametrize("reward", [RewardSpec(name="exact", label="reward"), RewardSpec(name="exact", label="answer")])
def test_a_reward_that_is_called_as_a_column_is_refused(reward: RewardSpec):
    with pytest.raises(SpecError, match="twice: give it another label"):
        check_rewards(ReinforceSpec(rewards=(reward,)))
