"""What kernels keep of the adapters for the passes of one step is never that of a step before: real trainings.

attention='flash' lets a CPU run the layers that a GPU runs (tasks/gptoss/joint.py), by plain torch in float32.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tasks.train import worker
from tests.tasks.train import runs as subject
from tests.tasks.train.runs import LORA, SPEC, adapter_digest, adapter_tensors, kill, losses, start, wait_for_step

pytestmark = pytest.mark.slow
ALL = LORA.model_copy(update={"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")})
THREE = SPEC.model_copy(
    update={
        "lora": ALL,
        "attention": "flash",
        "rows_per_device": 1,
        "gradient_accumulation": 3,
        "max_steps": 12,
        "save_steps": 3,
        "eval_steps": 2,
        "keep_best": True,
    }
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return subject.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps of three passes, over the end of an epoch whose last step has fewer, with evaluations between."""
    import pyarrow.parquet as pq

    num_rows = pq.read_table(Path(inputs["packed_folder"]) / "train.parquet").num_rows
    assert num_rows % 3 and num_rows < 36, num_rows
    folder = tmp_path_factory.mktemp("whole")
    assert subject.run(inputs, folder, THREE)["num_steps"] == 12
    return folder


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def assert_same(folder: Path, whole: Path) -> None:
    assert losses(folder) == losses(whole)
    assert adapter_digest(folder) == adapter_digest(whole)
    assert told(folder) == told(whole)


def assert_near(folder: Path, whole: Path) -> None:
    mine, theirs = losses(folder), losses(whole)
    assert [step for step, *_ in mine] == [step for step, *_ in theirs]
    assert [loss for _, loss, *_ in mine] == pytest.approx([loss for _, loss, *_ in theirs], abs=1e-5)
    tensors = adapter_tensors(folder)
    for name, tensor in adapter_tensors(whole).items():
        assert (tensors.pop(name) - tensor).norm() < 1e-3 * tensor.norm(), name
    assert not tensors
    for loss in ("validation_loss_before", "validation_loss_after"):
        assert told(folder)[loss] == pytest.approx(told(whole)[loss], abs=1e-5)


def test_three_passes_are_one_pass_of_three_rows(inputs: dict[str, Any], whole: Path, tmp_path: Path):
    one = THREE.model_copy(update={"rows_per_device": 3, "gradient_accumulation": 1})
    subject.run(inputs, tmp_path, one)
    assert_near(tmp_path, whole)


def test_nothing_kept_is_the_same_run_to_the_bit(inputs: dict[str, Any], whole: Path, tmp_path: Path):
    subject.run(inputs, tmp_path, THREE, "keep_nothing_of_adapters")
    assert_same(tmp_path, whole)


def test_killed_it_is_the_same_run(inputs: dict[str, Any], whole: Path, tmp_path: Path):
    for step in (4, 8):
        process = start(inputs, tmp_path, THREE)
        wait_for_step(tmp_path, step, process)
        kill(process)
    subject.run(inputs, tmp_path, THREE)
    assert "resuming from checkpoint-" in (tmp_path / "output.log").read_text()
    assert_same(tmp_path, whole)


class _EndWithinStep3(TrainerCallback):
    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


def test_a_training_that_ends_within_a_step_leaves_nothing_that_was_kept(inputs: dict[str, Any], tmp_path: Path):
    """The best adapter is loaded then, and evaluated."""
    job = subject.make_job(inputs, tmp_path, THREE)
    trainer = worker.make_trainer(worker.load_base(Path(job["base_folder"]), THREE), job, THREE)
    before = trainer.evaluate()["eval_loss"]
    trainer.add_callback(_EndWithinStep3())
    trainer.train()
    assert abs(trainer.evaluate()["eval_loss"] - before) > 1e-3
    model: Any = trainer.model
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.zero_()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, abs=1e-6)


def test_two_processes_train_what_one_does(inputs: dict[str, Any], tmp_path: Path):
    """DDP passes gradients on in the last pass of a step only."""
    within_an_epoch = THREE.model_copy(update={"max_steps": 2})  # at its end two ranks see a row again
    one = within_an_epoch.model_copy(update={"rows_per_device": 2})
    two = within_an_epoch.model_copy(update={"num_processes": 2})
    subject.run(inputs, tmp_path / "one", one)
    subject.run_ranks(inputs, tmp_path / "two", two)
    assert_near(tmp_path / "two", tmp_path / "one")
