"""The adapter of the lowest validation loss is what is kept, and a resumed run decides as the uninterrupted one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.checkpoints import checkpoint_step, latest_checkpoint
from tasks.errors import SpecError
from tasks.metrics import read_metrics
from tasks.specs import TrainSpec, change
from tests.tasks.train import runs as subject
from tests.tasks.train.runs import SPEC, adapter_digest, kill, losses, start, wait_for_step

SPOILT = SPEC.model_copy(update={"lr_scheduler": "constant", "eval_steps": 2, "save_steps": 3, "keep_best": True})
pytestmark = pytest.mark.chaos
WORSE = "unlearn_after_step_10"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return subject.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    subject.run(inputs, folder, SPOILT, WORSE)
    return folder


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_the_best_step_is_what_is_saved(inputs: dict[str, Any], whole: Path, tmp_path: Path):
    done = [(record["eval_loss"], record["step"]) for record in read_metrics(whole / "evaluations.jsonl")]
    assert [step for _, step in done] == list(range(2, 25, 2))
    lowest, step = min(done)
    assert step < 24, "the last step is the best: nothing is shown"
    assert result(whole)["best_step"] == step
    assert result(whole)["num_steps"] == 24
    assert result(whole)["validation_loss_after"] == pytest.approx(lowest, rel=1e-6)
    short = SPOILT.model_copy(update={"max_steps": step, "keep_best": False})  # a constant rate: the same first steps
    subject.run(inputs, tmp_path, short)
    assert adapter_digest(tmp_path) == adapter_digest(whole)


def test_a_resumed_run_keeps_the_same_best(inputs: dict[str, Any], whole: Path, tmp_path: Path):
    """Killed after the best step, from a checkpoint that came after it; and once from one that came before."""
    best = result(whole)["best_step"]
    for at in (best + 4, max(3, best - 1)):
        folder = tmp_path / str(at)
        process = start(inputs, folder, SPOILT, WORSE)
        wait_for_step(folder, at, process)
        kill(process)
        subject.run(inputs, folder, SPOILT, WORSE)
        assert losses(folder) == losses(whole)
        assert result(folder) == result(whole)
        assert adapter_digest(folder) == adapter_digest(whole)
        assert read_metrics(folder / "evaluations.jsonl") == read_metrics(whole / "evaluations.jsonl")


def test_it_stops_when_patience_is_over_and_stays_stopped(inputs: dict[str, Any], whole: Path, tmp_path: Path):
    spec = SPOILT.model_copy(update={"early_stopping_patience": 2})
    subject.run(inputs, tmp_path, spec, WORSE)
    best = result(whole)["best_step"]
    told = result(tmp_path)
    assert told["num_steps"] < 24
    done = read_metrics(tmp_path / "evaluations.jsonl")
    lowest = min(done, key=lambda record: record["eval_loss"])["step"]
    assert told["best_step"] == lowest and told["num_steps"] == lowest + 4
    assert checkpoint_step(latest_checkpoint(tmp_path / "checkpoints")) == told["num_steps"]
    if lowest == best:
        assert adapter_digest(tmp_path) == adapter_digest(whole)
    digest = adapter_digest(tmp_path)
    (tmp_path / "result.json").unlink()  # killed between the last step and its result
    subject.run(inputs, tmp_path, spec, WORSE)
    assert result(tmp_path) == told and adapter_digest(tmp_path) == digest


def test_the_last_step_is_saved_when_nobody_asks_for_the_best(inputs: dict[str, Any], whole: Path, tmp_path: Path):
    subject.run(inputs, tmp_path, SPOILT.model_copy(update={"keep_best": False}), WORSE)
    assert result(tmp_path)["best_step"] == 0
    last = load_file(str(tmp_path / "checkpoints" / "checkpoint-24" / "adapter_model.safetensors"))
    mine = subject.adapter_tensors(tmp_path)
    assert all(torch.equal(tensor, mine[name]) for name, tensor in last.items())
    assert adapter_digest(tmp_path) != adapter_digest(whole)


@pytest.mark.parametrize("asked", [{"keep_best": True}, {"early_stopping_patience": 3}])
def test_without_evaluations_there_is_no_best(asked: dict[str, Any]):
    with pytest.raises(SpecError, match="need evaluations: set eval_steps to 1 or more"):
        change(SPEC, asked)
    assert isinstance(change(SPEC, {**asked, "eval_steps": 5}), TrainSpec)
