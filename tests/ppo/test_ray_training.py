"""A finetune as a job of a real Ray cluster with two nodes: what is learnt, what is lost, and that none runs twice."""

import json
import logging
import os
import re
import signal
from pathlib import Path

import pytest

from tasks.artifacts import ArtifactStore
from tasks.checkpoints import checkpoint_step, latest_checkpoint
from tasks.errors import CapacityError
from tasks.procfs import list_pids
from tasks.specs import LaunchSpec
from tasks.train.run import check_launch, train_adapter
from tests.tasks.train.launched import LONG, LONG_HERE, ONE, Run, assert_near
from tests.tasks.train.runs import make_artifacts
from tests.waiting import runs, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture
def launch(cluster, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-of-the-worker")
    return LaunchSpec(
        launcher="ray",
        nodes=2,
        ray_address=cluster.jobs.url,
        ray_python=cluster.python,
        environment={"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        poll_s=0.5,
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return make_artifacts(ArtifactStore(folder / "home"), folder)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A longer training in two processes of this machine that nothing happened to."""
    return train_adapter(*inputs, LONG_HERE, ArtifactStore(tmp_path_factory.mktemp("whole")), lambda record: None)


@pytest.fixture
def run(launch, inputs, tmp_path):
    run = Run(inputs, tmp_path, LONG.model_copy(update={"launch": launch}))
    yield run
    run.process.kill()
    run.process.wait()
    for path in (run.store.root / "adapter").glob("*/ray_job.json"):
        from tasks.ray_job import end_left

        end_left(path.parent, 2, surely=False)


def job_of(folder: Path) -> str:
    return json.loads((folder / "ray_job.json").read_text())["submission_id"]


def pid_of(folder: Path, rank: int) -> int:
    path = folder / "heartbeat.json" if rank == 0 else folder / f"heartbeats/{rank}.json"
    return json.loads(path.read_text())["pid"]


def test_two_nodes_train_what_one_process_does(cluster, launch, inputs, tmp_path, caplog):
    one = train_adapter(*inputs, ONE, ArtifactStore(tmp_path / "one"), lambda record: None)
    spec, steps = ONE.model_copy(update={"launch": launch}), []
    assert re.match(
        r"launch: Ray 2\.60\.0, cluster: 2 nodes at http://\S+, 2 with 1 CPU or more, 2 machines", said(spec)
    )
    with caplog.at_level(logging.INFO):
        adapter = train_adapter(*inputs, spec, ArtifactStore(tmp_path / "home"), lambda record: steps.append(record))
    assert adapter.key == one.key
    assert_near(adapter, one)
    job_id = job_of(adapter.path)
    assert f"submitted Ray job {job_id}: 2 nodes, 2 processes" in caplog.text
    assert f"Ray job {job_id} runs on" in caplog.text and "[rank0] " in caplog.text and len(steps) >= 8
    logs = adapter.path / "logs" / job_id
    assert {"0.log", "1.log"} < {path.name for path in logs.iterdir()}
    told = cluster.jobs.find(job_id)
    assert told.status == "SUCCEEDED" and "[rank1] " in cluster.jobs.logs(job_id)
    assert not any(
        b"a-secret" in path.read_bytes() or cluster.token.encode() in path.read_bytes()
        for path in adapter.path.rglob("*")
        if path.is_file()
    )
    assert train_adapter(*inputs, spec, ArtifactStore(tmp_path / "home"), lambda record: None) == adapter  # found


def said(spec):
    return check_launch(spec, Path("/"))


def test_a_cluster_that_is_too_small_is_refused_before_anything_is_downloaded(launch):
    spec = ONE.model_copy(update={"gradient_accumulation": 6})
    with pytest.raises(
        CapacityError, match=r"the run needs 3 nodes with 1 CPU each, but .* has 2 nodes: one with 8 CPU"
    ):
        said(spec.model_copy(update={"launch": launch.model_copy(update={"nodes": 3})}))
    with pytest.raises(CapacityError, match=r"needs 2 nodes with 1 CPU, 9 GPU each.*Start Ray on 2 more nodes"):
        said(
            spec.model_copy(
                update={"launch": launch.model_copy(update={"gpus_per_node": 9, "nodes": 2}), "num_processes": 3}
            )
        )


def test_nodes_that_do_not_get_free_are_waited_for_and_then_said(launch, inputs, tmp_path, caplog):
    few = launch.model_copy(update={"nodes": 3, "reserve_timeout_s": 3.0})
    spec = ONE.model_copy(update={"gradient_accumulation": 6, "launch": few})
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(CapacityError, match=r"did not give 3 nodes with 1 CPU each within \d+ s \(free now: \d+ CPU"),
    ):
        train_adapter(*inputs, spec, ArtifactStore(tmp_path / "home"), lambda record: None)
    assert "is queued (its nodes are not free)" in caplog.text
    assert "tatara: waits for 3 nodes with 1 CPU each" in caplog.text


def test_a_python_without_ray_is_said(launch, inputs, tmp_path):
    spec = ONE.model_copy(update={"launch": launch.model_copy(update={"ray_python": "/no/python"})})
    with pytest.raises(ValueError, match=r"could not be started with /no/python on the head(.|\n)*/no/python"):
        train_adapter(*inputs, spec, ArtifactStore(tmp_path / "home"), lambda record: None)


def test_a_killed_rank_is_named_and_the_next_try_goes_on(run, whole):
    run.wait_for_step(15)
    os.kill(pid_of(run.folder, 1), signal.SIGKILL)
    assert run.ends() != 0
    said = run.log.read_text()
    assert re.search(
        r"TrainingError: Ray job \S+-1 ended as FAILED on the cluster: exit code \d+; rank 1 on \S+ ended", said
    )
    assert "(killed by SIGKILL): checkpoint-" in said and "validation loss before training" in said
    run.start_again()
    assert run.ends() == 0, run.log.read_text()
    assert run.says("resuming from checkpoint-") and job_of(run.folder).endswith("-2")
    run.assert_is(whole)


def test_a_killed_worker_leaves_one_job_that_the_next_one_follows(run, whole):
    run.wait_for_step(5)
    run.process.kill()
    run.process.wait()
    run.start_again()
    assert run.ends() == 0, run.log.read_text()
    job_id = job_of(run.folder)
    assert run.says(f"attached to Ray job {job_id}, which an earlier try submitted")
    assert run.log.read_text().count("submitted Ray job") == 1 and job_id.endswith("-1")
    run.assert_is(whole)


def test_a_cancelled_flow_stops_its_job_with_a_last_checkpoint(cluster, run, whole):
    run.wait_for_step(13)
    job_id, pids = job_of(run.folder), [pid_of(run.folder, rank) for rank in (0, 1)]
    run.process.terminate()
    assert run.ends() != 0
    assert run.says(f"Ray job {job_id} is told to stop, with 27 s for a last checkpoint"), run.log.read_text()
    assert cluster.jobs.find(job_id).status == "STOPPED" and not any(map(runs, pids))
    kept = latest_checkpoint(run.folder / "checkpoints", is_owner=False)
    assert kept is not None and checkpoint_step(kept) % 10  # one that the stop wrote
    run.start_again()
    assert run.ends() == 0, run.log.read_text()
    run.assert_is(whole)


def test_a_job_that_somebody_stops_says_so(cluster, run):
    run.wait_for_step(13)
    job_id = job_of(run.folder)
    cluster.jobs.stop(job_id)
    assert run.ends() != 0
    assert re.search(
        rf"TrainingError: Ray job {job_id} ended as CANCELLED .*not by Tatara: checkpoint-\d+ is kept",
        run.log.read_text(),
    )


def test_a_killed_driver_leaves_no_rank_behind(run, whole):
    """Ray ends its actors with it, and the kernel their launchers."""
    run.wait_for_step(13)
    pids = [pid_of(run.folder, rank) for rank in (0, 1)]
    (driver,) = [pid for pid in list_pids() if is_driver(pid, run.folder)]
    os.kill(driver, signal.SIGKILL)
    assert run.ends() != 0
    wait_for(lambda: not any(map(runs, pids)), 60)
    run.start_again()
    assert run.ends() == 0, run.log.read_text()
    run.assert_is(whole)


def is_driver(pid: int, folder: Path) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return str(folder / "ray_driver.py").encode() in words and b"-u" in words


def test_ranks_that_hang_are_found_and_named(launch, inputs, tmp_path):
    spec = LONG.model_copy(update={"launch": launch, "stall_timeout_s": 60.0, "stop_grace_s": 2.0})
    run = Run(inputs, tmp_path, spec)
    try:
        run.wait_for_step(5)
        frozen = pid_of(run.folder, 1)
        os.kill(frozen, signal.SIGSTOP)
        assert run.ends() != 0
        assert re.search(
            r"TrainingError.*no progress for \d+ s: .*rank 1 on \S+: step \d+ \(\w+\), last sign", run.log.read_text()
        )
        wait_for(lambda: not runs(frozen), 60)
    finally:
        run.process.kill()


def test_a_lost_connection_is_said_and_the_run_goes_on(cluster, launch, inputs, tmp_path, proxy, whole, monkeypatch):
    monkeypatch.setattr("tasks.ray_job._HEALTH_S", 1.0)
    through = launch.model_copy(update={"ray_address": proxy.url})
    run = Run(inputs, tmp_path, LONG.model_copy(update={"launch": through}))
    try:
        run.wait_for_step(5)
        proxy.cut()
        wait_for(lambda: run.says("the job goes on, and is followed by its files"), 60)
        step = len((run.folder / "metrics.jsonl").read_text().splitlines())
        wait_for(lambda: len((run.folder / "metrics.jsonl").read_text().splitlines()) > step + 5, 120)
        proxy.mend()
        assert run.ends() == 0, run.log.read_text()
        run.assert_is(whole)
    finally:
        run.process.kill()
