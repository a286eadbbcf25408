"""FSDP2 shares the frozen base out: what is learnt, saved and resumed is what one process and DDP learn."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.checkpoints import checkpoint_step, latest_checkpoint
from tasks.specs import TrainSpec
from tasks.train.placement import fit_processes
from tests.tasks.train import runs as subject
from tests.tasks.train.runs import SPEC, adapter_digest, adapter_tensors, kill, losses, wait_for_step

ONE = SPEC.model_copy(update={"max_steps": 4, "rows_per_device": 2, "gradient_accumulation": 2, "save_steps": 2})
SHARED = ONE.model_copy(update={"rows_per_device": 1, "num_processes": 2, "parallel": "fsdp2"})
MAX_DIFFERENCE = 2e-4  # of a loss: sums in another order; as for DDP (test_processes.py)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return subject.make_inputs(tmp_path_factory.mktemp("inputs"))


def assert_near(folder: Path, whole: Path) -> None:
    mine, theirs = losses(folder), losses(whole)
    assert [step for step, *_ in mine] == [step for step, *_ in theirs]
    assert [loss for _, loss, *_ in mine] == pytest.approx([loss for _, loss, *_ in theirs], abs=MAX_DIFFERENCE)
    tensors = adapter_tensors(folder)
    for name, tensor in adapter_tensors(whole).items():
        assert (tensors.pop(name) - tensor).norm() < 1e-3 * tensor.norm(), name
    assert not tensors


def test_two_processes_that_share_the_base_train_what_one_does(inputs: dict[str, Any], tmp_path: Path):
    whole, shared = tmp_path / "one", tmp_path / "shared"
    subject.run(inputs, whole, ONE)
    subject.run_ranks(inputs, shared, SHARED)
    assert_near(shared, whole)
    log = (shared / "output.log").read_text()
    parts = re.findall(r"base shared over 2 processes: ([\d,]+) of ([\d,]+) bytes here", log)
    held, of = (int(number.replace(",", "")) for number in parts[0])
    assert len(parts) == 2 and 0.5 * of <= held < 0.55 * of
    assert_plain(shared / "adapter", whole / "adapter")
    assert_plain(shared / "checkpoints/checkpoint-4", whole / "checkpoints/checkpoint-4")


def assert_plain(folder: Path, whole: Path) -> None:
    """The files are those of one process: same names, same adapter config, and no FSDP class in them."""
    names = {path.name.replace("rng_state_0", "rng_state") for path in folder.iterdir()} - {"rng_state_1.pth"}
    assert names == {path.name for path in whole.iterdir()}
    mine, theirs = (json.loads((each / "adapter_config.json").read_text()) for each in (folder, whole))
    for config in (mine, theirs):
        config["target_modules"].sort()  # PEFT keeps them in a set
    assert mine == theirs
    assert not [path.name for path in folder.iterdir() if b"FSDP" in path.read_bytes()]
