"""A run that goes on with another number of processes learns the same rows in each step: equal but for rounding."""

import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tasks import processes
from tasks.artifacts import ArtifactStore
from tasks.errors import SpecError, TrainingError
from tasks.metrics import read_metrics
from tasks.specs import LaunchSpec
from tasks.train.placement import fit_processes
from tasks.train.run import train_adapter
from tests.tasks.train.runs import SPEC, make_artifacts

PLANNED = SPEC.model_copy(
    update={"num_processes": 2, "gradient_accumulation": 2, "max_steps": 16, "learning_rate": 2e-3}
)
STEPS_PER_EPOCH = 3  # 17 rows, 8 a step: the last step of an epoch has one row left
MAX_DIFFERENCE = 1e-3  # of a loss, relative: sums in another order, and what an epoch's end left
MAX_DIFFERENCE_AT_AN_EPOCHS_END = 5e-3  # accelerate gives each process as many rows, so some of the first come again


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_one_two_one_processes_are_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TATARA_TRAIN_PROCESSES", "1")
    store = ArtifactStore(tmp_path / "whole")
    packed, base = make_artifacts(store, tmp_path)
    whole = train_adapter(packed, base, PLANNED, store, lambda record: None)
    store = ArtifactStore(tmp_path / "home")
    for number, until in (("1", 6), ("2", 11)):
        monkeypatch.setenv("TATARA_TRAIN_PROCESSES", number)

        def kill(record: dict[str, float], until: int = until) -> None:
            if record["step"] == until:
                (identity,) = (store.root / "adapter").glob("*/process.json")
                for pid in processes.find_members(identity, processes.find_alive(identity)):  # launcher and ranks
                    os.kill(pid, signal.SIGKILL)

        with pytest.raises(TrainingError, match="died without a result"):
            train_adapter(packed, base, PLANNED, store, kill)
    monkeypatch.setenv("TATARA_TRAIN_PROCESSES", "1")
    again = train_adapter(packed, base, PLANNED, store, lambda record: None)
    assert again.key == whole.key
    log = (again.path / "output.log").read_text()
    assert log.count("resuming from checkpoint-") == 3  # two ranks, then one
    mine, theirs = (read_metrics(adapter.path / "metrics.jsonl") for adapter in (again, whole))
    assert [record["tokens"] for record in mine] == [record["tokens"] for record in theirs]
    for number, (record, other) in enumerate(zip(mine, theirs, strict=True), start=1):
        fills_up = number % STEPS_PER_EPOCH == 0
        bound = MAX_DIFFERENCE_AT_AN_EPOCHS_END if fills_up else MAX_DIFFERENCE
        assert record["loss"] == pytest.approx(other["loss"], rel=bound), f"step {number}"
    tensors, others = (load_file(str(Path(a.adapter_folder) / "adapter_model.safetensors")) for a in (again, whole))
    for name, tensor in tensors.items():
        assert (tensor - others[name]).norm() < 0.05 * others[name].norm(), name


@pytest.mark.parametrize(
    ("available", "processes", "accumulation"), [(1, 1, 12), (2, 2, 6), (3, 3, 4), (5, 4, 3), (8, 6, 2), (99, 12, 1)]
)
def test_the_rows_of_a_step_stay(available: int, processes: int, accumulation: int):
    planned = SPEC.model_copy(update={"num_processes": 4, "gradient_accumulation": 3})
    fitted = fit_processes(planned, available)
    assert (fitted.num_processes, fitted.gradient_accumulation) == (processes, accumulation)
    assert fitted.model_copy(update={"num_processes": 4, "gradient_accumulation": 3}) == planned


def test_no_process_is_refused():
    with pytest.raises(SpecError, match="0 processes can't train"):
        fit_processes(SPEC, 0)


@pytest.mark.parametrize("launcher", ["slurm", "torchrun"])
def test_a_launch_has_its_own_number_of_processes(launcher: str):
    launch = LaunchSpec.model_validate({"launcher": launcher, "nodes": 3, "processes_per_node": 2, "address": "node1"})
    planned = SPEC.model_copy(update={"num_processes": 4, "gradient_accumulation": 3, "launch": launch})
    fitted = fit_processes(planned, 1)  # what this machine has does not count
    assert (fitted.num_processes, fitted.gradient_accumulation) == (6, 2)
    odd = planned.model_copy(update={"gradient_accumulation": 2})
    with pytest.raises(
        SpecError, match=r"launch starts 6 processes, but a step has 8 batches .*: start one of 1, 2, 4, 8"
    ):
        fit_processes(odd, 1)
