"""Killed at any moment, told to stop, moved: the run that goes on is the one that was never interrupted, to the bit."""

import json
import os
import random
import re
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tasks.checkpoints import checkpoint_step, latest_checkpoint
from tasks.metrics import read_metrics
from tests.tasks.train import runs as subject
from tests.tasks.train.runs import SPEC, adapter_digest, kill, losses, start, terminate, wait_for_step

SEED = int(os.environ.get("TATARA_KILL_SEED", "4"))
pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("TATARA_KILLS", "4"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return subject.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert subject.run(inputs, folder, SPEC)["num_steps"] == 24
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    assert losses(folder) == losses(whole)
    assert adapter_digest(folder) == adapter_digest(whole)
    mine, theirs = (json.loads((f / "result.json").read_text()) for f in (folder, whole))
    assert mine == theirs


def is_saving(folder: Path) -> bool:
    """Say whether a checkpoint is being written: it is there and not marked."""
    return any(not (path / "COMPLETE.json").exists() for path in (folder / "checkpoints").glob("checkpoint-*"))


@pytest.mark.timeout(900)
def test_killed_at_random_moments_it_is_the_same_run(inputs: dict[str, Any], whole: Path, tmp_path: Path):
    """SIGKILL after a random time, every second one while a checkpoint is written; each try gets one step further."""
    draw = random.Random(SEED)
    torn, steps = 0, []
    for number in range(KILLS):
        process = start(inputs, tmp_path, SPEC)
        if number % 2:
            subject.until(lambda: is_saving(tmp_path), process)
            time.sleep(draw.uniform(0, 0.01))
        else:
            at = draw.randint(len(steps), 20)
            wait_for_step(tmp_path, at, process)
            time.sleep(draw.uniform(0, 0.1))
        kill(process)
        torn += is_saving(tmp_path)
        steps.append(len(read_metrics(tmp_path / "metrics.jsonl")))
    result = subject.run(inputs, tmp_path, SPEC)
    assert result["num_steps"] == 24
    assert torn >= 1, "no kill met a checkpoint that was being written: nothing was shown of those"
    assert any(0 < step < 24 for step in steps)
    assert_same(tmp_path, whole)


def test_told_to_stop_it_leaves_a_checkpoint_of_that_step_and_goes_on_from_there(
    inputs: dict[str, Any], whole: Path, tmp_path: Path
):
    process = start(inputs, tmp_path, SPEC.model_copy(update={"save_steps": 100}))
    wait_for_step(tmp_path, 5, process)
    terminate(process)
    process.join(30)
    assert process.exitcode == 143
    told = json.loads((tmp_path / "failure.json").read_text())
    step = checkpoint_step(latest_checkpoint(tmp_path / "checkpoints"))
    assert 5 <= step < 24
    assert told["error"] == "TransientError"
    assert told["message"].startswith("the trainer was told to stop (SIGTERM) after step")
    assert told["message"].endswith(f"checkpoint-{step} is kept")
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == step  # no step was lost
    assert not (tmp_path / "result.json").exists()
    assert subject.run(inputs, tmp_path, SPEC)["num_steps"] == 24
    assert f"resuming from checkpoint-{step}" in (tmp_path / "output.log").read_text()
    assert_same(tmp_path, whole)


def test_training_that_returns_before_its_end_is_no_result(inputs: dict[str, Any], whole: Path, tmp_path: Path):
    """transformers' enable_jit_checkpoint returns normally after SIGTERM: only the step tells that it is not done."""
    told = subject.run(inputs, tmp_path, SPEC, "stop_as_trainer_does")
    assert told["error"] == "TransientError" and "after step 5 of 24: checkpoint-5 is kept" in told["message"]
    assert not (tmp_path / "adapter").exists()
    subject.run(inputs, tmp_path, SPEC)
    assert_same(tmp_path, whole)


def test_a_finished_run_that_lost_its_result_is_not_trained_further(
    inputs: dict[str, Any], whole: Path, tmp_path: Path
):
    """Trainer alone trains one more step of a run that has all its steps, at each resume."""
    folder = tmp_path / "again"
    shutil.copytree(whole, folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "adapter")
    assert subject.run(inputs, folder, SPEC)["num_steps"] == 24
    assert_same(folder, whole)


def test_a_tensor_that_was_never_trained_fails_the_run_and_is_named(inputs: dict[str, Any], tmp_path: Path):
    told = subject.run(inputs, tmp_path, SPEC.model_copy(update={"max_steps": 3}), "freeze_one_tensor")
    assert told["error"] == "TrainingError"
    assert re.search(r"1 of 16 adapter tensors did not move \(.*layers\.1\.mlp\.experts\.lora_A", told["message"])
    assert not (tmp_path / "adapter").exists()


def test_the_first_step_moves_no_a_and_that_is_no_fault(inputs: dict[str, Any], tmp_path: Path):
    """B is zero until then. The first is the best, or the only one above the warm-up's rate of 0."""
    best = SPEC.model_copy(update={"max_steps": 4, "eval_steps": 1, "keep_best": True})
    told = subject.run(inputs, tmp_path / "best", best, "unlearn_after_step_1")
    assert told.get("best_step") == 1, told
    warm = SPEC.model_copy(update={"max_steps": 2, "warmup_steps": 1})
    told = subject.run(inputs, tmp_path / "warm", warm)
    assert told.get("num_steps") == 2, told


@pytest.mark.parametrize("part", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_checkpoint_without_a_part_is_torn_and_the_one_before_is_taken(
    whole: Path, tmp_path: Path, part: str, listed: bool
):
    """Trainer alone begins with a fresh optimizer or schedule, without a word."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole / "checkpoints", folder)
    newest = latest_checkpoint(folder)
    assert newest is not None and checkpoint_step(newest) == 24
    (newest / part).unlink()
    if not listed:  # it never was there, so that its list of files is right
        names = json.loads((newest / "COMPLETE.json").read_text())
        del names[part]
        (newest / "COMPLETE.json").write_text(json.dumps(names))
    assert checkpoint_step(latest_checkpoint(folder)) == 20
    assert not newest.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["zeros", "one bit"])
def test_a_checkpoint_with_damaged_bytes_is_not_taken(whole: Path, tmp_path: Path, name: str, damage: str):
    """Each try would end in torch's error about it, with a sound checkpoint beside it."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole / "checkpoints", folder)
    newest = latest_checkpoint(folder)
    assert newest is not None and checkpoint_step(newest) == 24
    data = bytearray((newest / name).read_bytes())
    if damage == "zeros":
        data = bytearray(len(data))
    elif name.endswith(".safetensors"):
        data[8] ^= 1  # its weights carry no checksum: of one that loads, nothing tells
    else:
        with zipfile.ZipFile(newest / name) as archive:
            largest = max(archive.infolist(), key=lambda member: member.file_size)
        data[largest.header_offset + 200] ^= 1
    (newest / name).write_bytes(bytes(data))
    assert checkpoint_step(latest_checkpoint(folder)) == 20


def test_tokens_go_on_where_they_were(inputs: dict[str, Any], whole: Path, tmp_path: Path):
    """TRL's own num_tokens begins at zero at each resume; ours counts the rows themselves."""
    import pyarrow.parquet as pq

    rows = pq.read_table(Path(inputs["packed_folder"]) / "train.parquet")["input_ids"].to_pylist()
    records = read_metrics(whole / "metrics.jsonl")
    per_epoch = sum(map(len, rows))
    steps_per_epoch = -(-len(rows) // 2)
    assert records[steps_per_epoch - 1]["tokens"] == per_epoch
    assert records[-1]["tokens"] > per_epoch  # the run goes over the rows more than once
    process = start(inputs, tmp_path, SPEC)
    wait_for_step(tmp_path, 10, process)
    kill(process)
    subject.run(inputs, tmp_path, SPEC)
    assert [r["tokens"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [r["tokens"] for r in records]


def test_a_moved_run_goes_on(inputs: dict[str, Any], whole: Path, tmp_path: Path):
    """Another machine: base, rows and checkpoints lie elsewhere, the old places are gone."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(Path(inputs["base_folder"]), here / "base")
    shutil.copytree(Path(inputs["packed_folder"]), here / "packed")
    moved = {**inputs, "base_folder": str(here / "base"), "packed_folder": str(here / "packed")}
    process = start(moved, here / "run", SPEC)
    wait_for_step(here / "run", 10, process)
    kill(process)
    here.rename(there)
    moved = {**inputs, "base_folder": str(there / "base"), "packed_folder": str(there / "packed")}
    subject.run(moved, there / "run", SPEC)
    assert "resuming from checkpoint-8" in (there / "run" / "output.log").read_text()
    assert_same(there / "run", whole)


def test_a_template_that_changed_overnight_changes_no_token(inputs: dict[str, Any], whole: Path, tmp_path: Path):
    """The chat template of gpt-oss holds today's date: rows are tokenised once, by pack, and never again."""
    base = tmp_path / "base"
    shutil.copytree(Path(inputs["base_folder"]), base)
    process = start({**inputs, "base_folder": str(base)}, tmp_path / "run", SPEC)
    wait_for_step(tmp_path / "run", 10, process)
    kill(process)
    template = base / "chat_template.jinja"
    template.write_text("Current date: 2031-01-01" + template.read_text())
    subject.run({**inputs, "base_folder": str(base)}, tmp_path / "run", SPEC)
    assert_same(tmp_path / "run", whole)


def test_only_the_newest_checkpoints_are_kept(whole: Path):
    assert sorted(path.name for path in (whole / "checkpoints").glob("checkpoint-*")) == [
        "checkpoint-20",
        "checkpoint-24",
    ]


def test_a_fault_of_a_library_is_told_with_its_class(inputs: dict[str, Any], tmp_path: Path):
    told = subject.run({**inputs, "base_folder": str(tmp_path / "gone")}, tmp_path / "run", SPEC)
    assert told["message"].startswith(f"{told['error']}("), told


def test_a_clock_that_was_set_back_costs_no_checkpoint(inputs: dict[str, Any], whole: Path, tmp_path: Path):
    """Trainer's own rotation goes by the time of the folders: it would remove each checkpoint that it just wrote."""
    process = start(inputs, tmp_path, SPEC)
    wait_for_step(tmp_path, 10, process)
    kill(process)
    tomorrow = time.time() + 86400
    for path in (tmp_path / "checkpoints").glob("checkpoint-*"):
        os.utime(path, (tomorrow, tomorrow))
    process = start(inputs, tmp_path, SPEC)
    wait_for_step(tmp_path, 18, process)
    kill(process)
    kept = latest_checkpoint(tmp_path / "checkpoints", is_owner=False)
    assert checkpoint_step(kept) >= 16
    subject.run(inputs, tmp_path, SPEC)
    assert_same(tmp_path, whole)
