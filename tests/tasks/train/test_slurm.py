"""Trainings as jobs of a real SLURM with two nodes: what is learnt, what is lost, and that none is submitted twice."""

import json
import logging
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.artifacts import ArtifactStore, BaseCheckpoint, PackedDataset
from tasks.checkpoints import checkpoint_step, latest_checkpoint
from tasks.errors import SpecError, TransientError
from tasks.train.run import train_adapter
from tests import slurm
from tests.ports import free_port
from tests.slurm import Cluster
from tests.tasks.train.launched import LONG, LONG_HERE, ONE, TWO, Run, assert_near, launched
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


def test_two_nodes_train_what_one_process_does(cluster: Cluster, inputs: Inputs, one, tmp_path: Path, caplog):
    before = cluster.jobs()
    with caplog.at_level(logging.INFO):
        adapter = train_adapter(*inputs, launched(TWO, address=""), ArtifactStore(tmp_path), lambda record: None)
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


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory):
    """A longer training in two processes of this machine that nothing happened to."""
    return train_adapter(*inputs, LONG_HERE, ArtifactStore(tmp_path_factory.mktemp("whole")), lambda record: None)


@pytest.fixture
def run(cluster: Cluster, inputs: Inputs, tmp_path: Path) -> Iterator[Run]:
    run = Run(inputs, tmp_path)
    yield run
    run.process.kill()
    run.process.wait()
    for job_id, state in cluster.jobs().items():
        if state in ("PENDING", "RUNNING", "COMPLETING"):
            cluster.run("scancel", job_id)
    wait_for(lambda: not set(cluster.jobs().values()) & {"PENDING", "RUNNING", "COMPLETING"}, 90)


def test_a_killed_rank_is_named_and_the_next_try_goes_on(cluster: Cluster, run: Run, whole):
    run.wait_for_step(15)
    os.kill(json.loads((run.folder / "heartbeats/1.json").read_text())["pid"], signal.SIGKILL)
    assert run.ends() != 0
    said = run.log.read_text()
    assert re.search(
        r"TrainingError: SLURM job \d+ ended as FAILED on n\[1-2\]: exit code \d+:\d+; rank 1 on \S+ ended", said
    )
    assert "(killed by SIGKILL): checkpoint-" in said and "validation loss before training" in said
    run.start_again()
    assert run.ends() == 0, run.log.read_text()
    assert run.says("resuming from checkpoint-")
    run.assert_is(whole)


def test_a_killed_worker_leaves_one_job_that_the_next_one_follows(cluster: Cluster, run: Run, whole):
    """SIGKILL also between sbatch and the file with its number: the job is found by its name."""
    before = cluster.jobs().keys()
    run.wait_for_step(5)
    run.process.kill()
    run.process.wait()
    (run.folder / "slurm_job.json").unlink()
    run.start_again()
    assert run.ends() == 0, run.log.read_text()
    (job_id,) = cluster.jobs().keys() - before
    assert run.says(f"attached to SLURM job {job_id}, which an earlier try submitted")
    assert run.log.read_text().count("submitted SLURM job") == 1
    run.assert_is(whole)


def test_a_worker_killed_while_the_job_waits_leaves_one_job(cluster: Cluster, run: Run):
    before = cluster.jobs().keys()
    wait_for(lambda: cluster.jobs().keys() - before, 60)
    run.process.kill()
    run.process.wait()
    (run.folder / "slurm_job.json").unlink(missing_ok=True)  # as if it had been killed a moment earlier
    run.start_again()
    wait_for(lambda: run.says("attached to SLURM job"), 60)
    assert len(cluster.jobs().keys() - before) == 1
    run.process.terminate()
    assert run.ends() != 0
    assert len(cluster.jobs().keys() - before) == 1


def test_a_preempted_job_is_requeued_and_goes_on(cluster: Cluster, run: Run, whole):
    before = cluster.jobs().keys()
    run.wait_for_step(15)
    (job_id,) = cluster.jobs().keys() - before
    cluster.run("sbatch", "--partition=high", "--nodes=2", "--wrap=sleep 1", "--output=/dev/null")
    assert run.ends() == 0, run.log.read_text()
    said = run.log.read_text()
    assert re.search(rf"SLURM job {job_id} is queued \(\w+.*\), requeued once", said)
    assert f"SLURM job {job_id} runs on n[1-2], requeued once" in said
    assert said.count("submitted SLURM job") == 1 and "resuming from checkpoint-" in said
    run.assert_is(whole)


def test_near_its_time_limit_a_job_saves_and_goes_back_into_the_queue(cluster: Cluster, run: Run, whole):
    before = cluster.jobs().keys()
    run.wait_for_step(13)
    (job_id,) = cluster.jobs().keys() - before
    cluster.run("scancel", "--signal=USR1", "--batch", job_id)  # what --signal=B:USR1@180 does 180 s before
    assert run.ends() == 0, run.log.read_text()
    said = run.log.read_text()
    assert "tatara: the time limit is near" in said and "tatara: back into the queue" in said
    assert f"SLURM job {job_id} runs on n[1-2], requeued once" in said
    run.assert_is(whole)


def test_a_job_that_saves_nothing_in_its_time_is_not_requeued_for_ever(cluster: Cluster, run: Run):
    """Frozen before the first step, and its limit lowered to what is over: SLURM says so, and then ends it."""
    before = cluster.jobs().keys()
    beats = (run.store.root / "adapter").glob  # written in place: there for a moment before it says anything
    wait_for(lambda: any(path.stat().st_size for path in beats("*/heartbeats/1.json")), 120)
    frozen = json.loads((run.folder / "heartbeats/1.json").read_text())["pid"]
    os.kill(frozen, signal.SIGSTOP)
    (job_id,) = cluster.jobs().keys() - before
    cluster.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=1")
    assert run.ends() != 0
    assert run.says("SpecError") and run.says("within the time limit (30) no checkpoint was written")
    wait_for(lambda: not runs(frozen), 60)


def test_a_job_that_somebody_cancels_says_so_and_is_not_tried_again(cluster: Cluster, run: Run):
    before = cluster.jobs().keys()
    run.wait_for_step(13)
    (job_id,) = cluster.jobs().keys() - before
    cluster.run("scancel", job_id)
    assert run.ends() != 0
    said = run.log.read_text()
    assert f"TrainingError: SLURM job {job_id} ended as CANCELLED on n[1-2]: it was cancelled (scancel), not by" in said
    assert re.search(r"checkpoint-1\d is kept; run again to go on", said)


def test_a_cancelled_flow_cancels_its_job_with_a_last_checkpoint(cluster: Cluster, run: Run, whole):
    before = cluster.jobs().keys()
    run.wait_for_step(13)
    (job_id,) = cluster.jobs().keys() - before
    run.process.terminate()
    assert run.ends() != 0
    assert run.says(f"SLURM job {job_id} is told to stop, with 27 s for a last checkpoint")
    assert cluster.jobs()[job_id] in ("FAILED", "CANCELLED")
    kept = latest_checkpoint(run.folder / "checkpoints", is_owner=False)
    assert kept is not None and checkpoint_step(kept) % 10  # one that the stop wrote
    run.start_again()
    assert run.ends() == 0, run.log.read_text()
    run.assert_is(whole)


def test_a_job_in_the_queue_says_why_and_is_cancelled_with_the_flow(cluster: Cluster, inputs: Inputs, tmp_path: Path):
    busy = cluster.run("sbatch", "--parsable", "--nodes=1", "--wrap=sleep 600", "--output=/dev/null").strip()
    try:
        wait_for(lambda: cluster.jobs()[busy] == "RUNNING", 30)
        run = Run(inputs, tmp_path)
        wait_for(lambda: run.says("is queued (Resources"), 60)
        run.process.terminate()
        assert run.ends() != 0
        (job_id,) = re.findall(r"submitted SLURM job (\d+)", run.log.read_text())
        assert cluster.jobs()[job_id] == "CANCELLED"
    finally:
        cluster.run("scancel", busy)


def test_a_folder_that_a_node_does_not_see_is_said_early(cluster: Cluster, inputs: Inputs):
    with pytest.raises(SpecError, match=r"node 1 of 0 to 1 did not show that it sees .*blind/adapter") as caught:
        train_adapter(*inputs, LONG, ArtifactStore(cluster.blind), lambda record: None)
    assert "put TATARA_HOME, this checkout and its Python on storage" in str(caught.value)
    assert "tatara: node n2 does not see" in str(caught.value)


def test_a_refusal_is_told_in_slurms_own_words(cluster: Cluster, inputs: Inputs, tmp_path: Path):
    before = cluster.jobs()
    with pytest.raises(SpecError, match=r"SLURM refused the job: .*[Ii]nvalid partition"):
        train_adapter(*inputs, launched(LONG, partition="nowhere"), ArtifactStore(tmp_path), lambda record: None)
    assert cluster.jobs() == before


def test_a_controller_that_is_away_is_worth_another_try(cluster: Cluster, inputs: Inputs, tmp_path: Path, monkeypatch):
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        re.sub(r"SlurmctldPort=\d+", f"SlurmctldPort={free_port()}\nMessageTimeout=2", cluster.conf.read_text())
    )
    monkeypatch.setenv("SLURM_CONF", str(conf))
    with pytest.raises(TransientError, match="SLURM does not answer"):
        train_adapter(*inputs, LONG, ArtifactStore(tmp_path / "home"), lambda record: None)


def test_ranks_that_hang_are_found_and_named(cluster: Cluster, inputs: Inputs, tmp_path: Path):
    """One rank is frozen: the other waits for it for ever, and beats."""
    run = Run(inputs, tmp_path, LONG.model_copy(update={"stall_timeout_s": 90.0, "stop_grace_s": 2.0}))
    try:
        run.wait_for_step(5)
        frozen = json.loads((run.folder / "heartbeats/1.json").read_text())["pid"]
        os.kill(frozen, signal.SIGSTOP)
        assert run.ends() != 0
        said = run.log.read_text()
        assert re.search(
            r"TrainingError.*no progress for \d+ s: .*rank 1 on n[12]: step \d+ \(\w+\), last sign", said
        ), said
        wait_for(lambda: not runs(frozen), 60)
    finally:
        run.process.kill()
