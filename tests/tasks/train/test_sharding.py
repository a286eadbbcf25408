"""FSDP2 shares the frozen base out: what is learnt, saved and resumed is what one process and DDP learn."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.checkpoints import checkpoint_step, is_complete, latest_checkpoint
from tasks.specs import TrainSpec
from tasks.train.placement import fit_processes
from tests.tasks.train import runs as subject
from tests.tasks.train.runs import SPEC, adapter_digest, adapter_tensors, kill, losses, wait_for_step

EACH = {"max_steps": 4, "rows_per_device": 2, "gradient_accumulation": 2, "save_steps": 2, "eval_steps": 2}
ONE = SPEC.model_copy(update={**EACH, "keep_best": True})
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


@pytest.mark.slow
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
    assert not [path.name for path in folder.rglob("*.*") if b"FSDP" in path.read_bytes()]


def wait_and_kill(ranks: list[Any], folder: Path, step: int) -> None:
    """Kill all ranks at once, some time after a step, as the loss of a machine does."""
    wait_for_step(folder, step, ranks[0])
    for rank in ranks:
        kill(rank)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_killed_with_the_base_shared_it_is_the_same_run(inputs: dict[str, Any], tmp_path: Path):
    """Also while a checkpoint is written; a torn one is never taken."""
    spec = SHARED.model_copy(update={"max_steps": 12})
    whole, again = tmp_path / "whole", tmp_path / "again"
    result = subject.run_ranks(inputs, whole, spec)
    for until in (3, 7):
        wait_and_kill(subject.start_ranks(inputs, again, spec), again, until)
    ranks = subject.start_ranks(inputs, again, spec)
    saving = again / "checkpoints/checkpoint-10"
    assert subject.until(lambda: saving.exists() and not (saving / "COMPLETE.json").exists(), ranks[0])
    for rank in ranks:
        kill(rank)
    kept = 10 if is_complete(saving) else 8  # the kill came a moment too late, or not
    assert checkpoint_step(latest_checkpoint(again / "checkpoints", is_owner=False)) == kept
    assert subject.run_ranks(inputs, again, spec) == result
    assert f"resuming from checkpoint-{kept}" in (again / "output.log").read_text()
    assert losses(again) == losses(whole)
    assert adapter_digest(again) == adapter_digest(whole)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_one_process_ddp_and_fsdp2_go_on_with_each_other(inputs: dict[str, Any], tmp_path: Path):
    """Adapter, optimizer, schedule and random generators of a checkpoint are the plain ones, whoever wrote it."""
    within_an_epoch = {"max_steps": 8, "gradient_accumulation": 1}  # at its end two ranks see a row again
    one, shared = (spec.model_copy(update=within_an_epoch) for spec in (ONE, SHARED))
    ddp = shared.model_copy(update={"parallel": "ddp"})
    whole, mixed, whole_of_two = tmp_path / "one", tmp_path / "mixed", tmp_path / "two"
    subject.run(inputs, whole, one)
    wait_and_kill([subject.start(inputs, mixed, one)], mixed, 3)
    wait_and_kill(subject.start_ranks(inputs, mixed, shared), mixed, 5)
    wait_and_kill(subject.start_ranks(inputs, mixed, ddp), mixed, 7)
    subject.run(inputs, mixed, one)
    assert (mixed / "output.log").read_text().count("resuming from checkpoint-") == 5  # of two ranks, twice, and one
    assert_near(mixed, whole)
    subject.run_ranks(inputs, whole_of_two, ddp)
    wait_and_kill(subject.start_ranks(inputs, tmp_path / "both", shared), tmp_path / "both", 3)
    subject.run_ranks(inputs, tmp_path / "both", ddp)
    assert losses(tmp_path / "both") == losses(whole_of_two)  # to the bit: only the place of the base differs
    assert adapter_digest(tmp_path / "both") == adapter_digest(whole_of_two)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_processes": 1}, "num_processes is 1: set 2 or more, or choose parallel='ddp'"),
        ({"quantization": "nf4"}, "can't share out a base in nf4: set quantization='none', or choose parallel='ddp'"),
    ],
)
def test_what_can_not_be_shared_is_refused_with_a_way_out(changes: dict[str, Any], said: str):
    with pytest.raises(ValidationError, match=re.escape(said)):
        TrainSpec.model_validate(SHARED.model_dump() | changes)


def test_one_process_has_nobody_to_share_with():
    fitted = fit_processes(SHARED, 1)
    assert (fitted.num_processes, fitted.parallel, fitted.gradient_accumulation) == (1, "ddp", 4)
    assert TrainSpec.model_validate(fitted.model_dump()) == fitted
    assert fit_processes(SHARED, 8).parallel == "fsdp2"


def test_where_the_base_lies_makes_no_other_adapter():
    """A run that is short of memory is gone on with, its base shared, from its last checkpoint."""
    assert SHARED.key_values() == SHARED.model_copy(update={"parallel": "ddp"}).key_values()
