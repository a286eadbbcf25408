"""Trainings as jobs of a real SLURM with two nodes: what is learnt, what is lost, and that no job is submitted twice."""

import logging
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tasks.artifacts import ArtifactStore, BaseCheckpoint, PackedDataset
from tasks.errors import MissingError, SpecError, TrainingError
from tasks.train.run import train_adapter
from tests import slurm
from tests.slurm import Cluster
from tests.tasks.train.launched import ONE, TWO, launched, losses, train_apart
from tests.tasks.train.runs import make_artifacts
from tests.waiting import runs, wait_for

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(slurm.why_not()), reason=slurm.why_not()),
]
Inputs = tuple[PackedDataset, BaseCheckpoint]


@pytest.fixture(scope="module")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm.running(tmp_path_factory.mktemp("cluster") / "slurm") as cluster:
        yield cluster


@pytest.fixture
def cluster(_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("SLURM_CONF", str(_cluster.conf))
    return _cluster


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    return make_artifacts(ArtifactStore(folder / "home"), folder)


@pytest.fixture(scope="module")
def one(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory):
    """The same training in one process of this machine."""
    store = ArtifactStore(tmp_path_factory.mktemp("one"))
    return train_adapter(*inputs, ONE, store, lambda record: None)


def assert_near(adapter, one) -> None:
    assert losses(adapter) == pytest.approx(losses(one), abs=2e-4)  # sums in another order, as between two processes
    tensors, others = (load_file(str(Path(a.adapter_folder) / "adapter_model.safetensors")) for a in (adapter, one))
    for name, tensor in tensors.items():
        assert (tensor - others[name]).norm() < 1e-3 * others[name].norm(), name


def test_two_nodes_train_what_one_process_does(cluster: Cluster, inputs: Inputs, one, tmp_path: Path, caplog):
    before = cluster.jobs()
    with caplog.at_level(logging.INFO):
        adapter = train_adapter(*inputs, TWO, ArtifactStore(tmp_path), lambda record: None)
    assert adapter.key == one.key
    assert_near(adapter, one)
    (job_id,) = cluster.jobs().keys() - before.keys()
    assert f"SLURM job {job_id} runs on n[1-2]" in caplog.text
    assert "[rank0] " in caplog.text and f"submitted SLURM job {job_id}: 2 nodes, 2 processes" in caplog.text
    logs = adapter.path / "logs" / f"{job_id}-0"
    assert {path.name for path in logs.iterdir()} == {"n1", "n2"}
    assert "SBATCH" in (adapter.path / "job.sbatch").read_text()
    assert train_adapter(*inputs, TWO, ArtifactStore(tmp_path), lambda record: None) == adapter  # found, not trained
    assert len(cluster.jobs()) == len(before) + 1
