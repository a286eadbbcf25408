"""`tatara watch`: what a run streams, as lines and as a page that needs nothing from elsewhere."""

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from deployments.cli import main
from deployments.watch import Follower, find_run, open_run
from tasks.artifacts import ArtifactStore
from tasks.errors import MissingError, SpecError
from tasks.metrics import append_metrics
from tasks.reinforce.columns import generations_columns
from tasks.reinforce.streams import CsvStream, NewRows, read_rows
from tests.ports import free_port
from tests.tasks.reinforce.runs import SPEC
from tests.waiting import wait_for


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run by rewards of two steps, not done yet, in this test's TATARA_HOME."""
    folder = ArtifactStore.default().root / "adapter" / "0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"spec": SPEC.model_dump(mode="json")}))
    CsvStream(folder / "generations.csv", generations_columns(SPEC)).cut(0)
    for step in (1, 2):
        add_step(folder, step)
    return folder


def add_step(folder: Path, step: int) -> None:
    rows = [
        {"step": step, "question": "1+1?", "completion": text, "answer": "2", "reward": reward, "whole": text}
        for text, reward in (("2 </td><script>", 1.5), ("たぶん\n3", 0.25))
    ]
    CsvStream(folder / "generations.csv", generations_columns(SPEC)).append(rows)
    record = {"step": step, "num_steps": 9, "loss": 0.01, "reward": 0.5 * step, "digits_mean": 0.25, "ratio_mean": 1.0}
    append_metrics(folder / "metrics.jsonl", {**record, "adapter_share": 0.98, "rollout_tokens_per_s": 1234.0})


def test_each_step_is_one_line_with_its_best_and_worst_completion(folder: Path):
    followed = Follower(open_run(folder))
    assert followed.lines() == [
        "step 1/9  reward 0.500  digits 0.250  loss 0.0100  ratio 1.000  adapter 98 %  1,234 tokens/s",
        "    +1.50  1+1? -> 2 </td><script>",
        "    +0.25  1+1? -> たぶん 3",
        "step 2/9  reward 1.000  digits 0.250  loss 0.0100  ratio 1.000  adapter 98 %  1,234 tokens/s",
        "    +1.50  1+1? -> 2 </td><script>",
        "    +0.25  1+1? -> たぶん 3",
    ]
    assert followed.lines() == []
    add_step(folder, 3)
    assert followed.lines()[0].startswith("step 3/9  reward 1.5")


def test_completions_that_come_before_their_record_are_shown_with_it(folder: Path):
    metrics, followed = folder / "metrics.jsonl", Follower(open_run(folder))
    kept = metrics.read_bytes()
    metrics.write_bytes(kept[: kept.index(b"\n") + 1])
    assert len(followed.lines()) == 3
    metrics.write_bytes(kept)
    assert [line.split()[0] for line in followed.lines()] == ["step", "+1.50", "+0.25"]


def test_a_stream_that_a_resume_cut_is_read_anew(folder: Path):
    path = folder / "generations.csv"
    rows = NewRows(path, keep=3)
    assert ([row["step"] for row in rows.read()], len(rows.newest)) == (["1", "1", "2", "2"], 3)
    assert rows.read() == []
    with path.open("ab") as handle:
        handle.write(b"3,torn")
    assert rows.read() == []
    CsvStream(path, generations_columns(SPEC)).cut(1)
    assert [row["step"] for row in rows.read()] == ["1", "1"] == [row["step"] for row in rows.newest]

    assert rows.is_anew


@pytest.mark.parametrize("is_same_file", [False, True])  # the second: a new file got the number of one that is gone
def test_a_resume_that_outgrew_what_it_cut_is_read_anew(tmp_path: Path, is_same_file: bool):
    stream = CsvStream(tmp_path / "generations.csv", ("step", "completion"))
    stream.cut(0)
    stream.append([{"step": step, "completion": f"short {step}"} for step in range(1, 6)])
    rows = NewRows(stream.path, keep=40)
    assert len(rows.read()) == 5 and rows.is_anew
    stream.append([{"step": 6, "completion": "kept"}])
    assert [row["step"] for row in rows.read()] == ["6"] and not rows.is_anew
    if is_same_file:
        stream.path.write_text("step,completion\r\n" + "".join(f"{step},kept {step}\r\n" for step in range(1, 4)))
    else:
        stream.cut(3)
    for step in range(4, 12):
        stream.append([{"step": step, "completion": f'a longer answer, "quoted"\nand with a second line {step}'}])
    assert [row["step"] for row in rows.read()] == [str(step) for step in range(1, 12)]
    assert rows.is_anew and list(rows.newest) == read_rows(stream.path)


def test_a_resume_shows_no_completion_of_what_was_cut(folder: Path):
    """Step 3's completions came before its record; the run was killed between both, and step 3 done again."""
    followed = Follower(open_run(folder))
    followed.lines()
    add_step(folder, 3)
    records = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(b"".join(records.splitlines(keepends=True)[:2]))
    assert followed.lines() == []
    stream = CsvStream(folder / "generations.csv", generations_columns(SPEC))
    stream.cut(2)
    stream.append([{"step": 3, "question": "1+1?", "completion": "done again", "answer": "2", "reward": 9.0}])
    (folder / "metrics.jsonl").write_bytes(records)
    assert [line.strip() for line in followed.lines()[1:]] == ["+9.00  1+1? -> done again"] * 2


def test_the_page_is_whole_by_itself_and_shows_text_as_text(folder: Path, capsys: pytest.CaptureFixture[str]):
    target = folder.parent / "page.html"
    assert main(["watch", "0123", "--html", str(target), "--once"]) == 0
    text = target.read_text()
    assert "step 2 of 9" in text and "polyline" in text and "1+1?" in text
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.search(r"""(src|href)=|url\(|@import""", text)
    assert 'http-equiv="refresh"' in text
    (folder / "manifest.json").write_text("{}")
    assert main(["watch", "--html", str(target)]) == 0  # a run that is done ends the watch
    assert 'http-equiv="refresh"' not in target.read_text()
    assert "step 2/9" in capsys.readouterr().out


def test_the_page_is_served_on_loopback(folder: Path):
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "deployments.cli", "watch", "--page", str(port)])
    try:
        said: list[str] = []

        def is_there() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as reply:
                    said.append(reply.read().decode())
            except OSError:
                return False
            return True

        wait_for(is_there, 60)
        assert "step 2 of 9" in said[-1]
        add_step(folder, 3)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics.json", timeout=5) as reply:
            assert [record["step"] for record in json.load(reply)] == [1, 2, 3]
        CsvStream(folder / "generations.csv", generations_columns(SPEC)).cut(1)  # a resume, which then outgrows it
        for step in range(2, 12):
            add_step(folder, step)
        assert is_there() and is_there() and "step 11 of 9" in said[-1]
    finally:
        process.terminate()
        process.wait(30)


def test_an_sft_run_is_watched_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = ArtifactStore.default().root / "adapter" / "fedcba9876543210"
    folder.mkdir(parents=True)
    append_metrics(folder / "metrics.jsonl", {"step": 4, "num_steps": 8, "loss": 1.5, "tokens_per_s": 100})
    assert main(["watch", "--once"]) == 0
    assert "step 4/8  loss 1.5000  100 tokens/s" in capsys.readouterr().out


def test_a_name_that_fits_none_or_two_says_what_there_is(folder: Path):
    root = ArtifactStore.default().root
    with pytest.raises(MissingError, match=r"no run 'ffff' with metrics.*there are: 01234567"):
        find_run("ffff", root)
    other = folder.with_name("0123ffff")
    other.mkdir()
    append_metrics(other / "metrics.jsonl", {"step": 1, "loss": 1.0})
    with pytest.raises(SpecError, match="fits 2 of"):
        find_run("0123", root)
    assert find_run("latest", root).folder == other
