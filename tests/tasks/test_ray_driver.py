"""What a Ray job's driver says of its nodes' ends, with a stand-in for Ray; real nodes are in tests/ppo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks import errors
from tasks.followed_job import raise_end
from tasks.job_report import JobReport
from tasks.launch_script import Work
from tasks.ray_driver import LOST_NODE, Node
from tasks.ray_job import RayQueue
from tasks.specs import LaunchSpec
from tasks.supervision import Job
from tasks.trainer_job import Terms, run_trainer
from tests.ports import free_port
from tests.ray_dashboard import Dashboard
from tests.waiting import runs, wait_for

STAND_INS = Path(__file__).parents[1] / "stand_ins"
SAVES = "trap 'sleep 1; echo node $TATARA_NODE saved; exit 143' TERM; while :; do sleep 0.1; done"
LAUNCH = LaunchSpec(launcher="ray", nodes=2, poll_s=0.02)


@pytest.fixture
def job(ray: Dashboard, tmp_path: Path) -> Job:
    """One that was submitted: its plan and its driver are there."""
    made = Job(argv=[], env={}, folder=tmp_path, stall_timeout_s=9.0, grace_s=5.0)
    work = Work(name="n", module="none", folder=str(tmp_path), root="/", python="python")
    (tmp_path / "job.json").write_text("{}")
    RayQueue(made, LAUNCH.model_copy(update={"ray_address": ray.url}), work, ()).start()
    return made


def drive(job: Job, node: str, fault: str = "", **variables: str) -> int:
    """Run the driver as Ray does, each node the same lines of bash."""
    (job.folder / "node.sh").write_text(node)
    env = {**os.environ, "PYTHONPATH": str(STAND_INS), **variables, **({"RAY_FAULT": fault} if fault else {})}
    argv = [sys.executable, "-u", str(job.folder / "ray_driver.py"), str(job.folder / "ray_plan.json")]
    return subprocess.run(argv, env=env, capture_output=True, timeout=60, check=False).returncode


def end(job: Job, code: int) -> JobReport:
    name = json.loads((job.folder / "ray_job.json").read_text())["submission_id"]
    return JobReport(job_id=name, system="Ray", state="FAILED", exit_code=str(code), nodes="the cluster")


def test_a_node_that_runs_out_of_memory_is_said_with_a_way_out(job: Job):
    code = drive(job, SAVES, "1 poll 3 OutOfMemoryError")
    assert "node 0 saved" in job.log.read_text()
    with pytest.raises(
        errors.CapacityError, match=r"ran out of memory.*\(IP: 10\.0\.0\.2\).*: take|more nodes with fsdp2"
    ):
        raise_end(end(job, code), job, LAUNCH)


@pytest.mark.parametrize("number", [0, 1])
def test_the_nodes_that_are_left_have_time_for_a_last_checkpoint(job: Job, number: int):
    assert drive(job, SAVES, f"{number} poll 3 ActorDiedError") == LOST_NODE
    said = job.log.read_text()
    assert f"node {1 - number} saved" in said
    assert "tatara: a node of the job is lost (The actor died unexpectedly before finishing this task." in said


def test_a_lost_node_is_the_cause_though_the_others_notice_it_first(job: Job):
    fails = '[ "$TATARA_NODE" = 1 ] || { sleep 1; exit 1; }\n' + SAVES
    assert drive(job, fails, "1 poll 5 ActorDiedError") == LOST_NODE


def test_an_actor_that_can_not_be_placed_any_more_is_a_lost_node(job: Job):
    assert drive(job, SAVES, "1 look 1 ActorUnschedulableError") == LOST_NODE


def test_a_node_that_ray_can_not_set_up_is_worth_another_try(job: Job):
    code = drive(job, SAVES, "1 look 1 RuntimeEnvSetupError")
    with pytest.raises(errors.TransientError, match="Ray could not set up the job on a node"):
        raise_end(end(job, code), job, LAUNCH)


def test_a_head_whose_locale_knows_no_japanese_is_no_fault(job: Job):
    assert drive(job, "echo 日本語 $TATARA_ADDRESS", PYTHONIOENCODING="latin-1", LC_ALL="C", PYTHONUTF8="0") == 0
    said = job.log.read_text().splitlines()
    assert said[0] == f"tatara: job {end(job, 0).job_id}"
    assert sorted(said[-2:]) == ["日本語 10.0.0.1", "日本語 10.0.0.2"]


@pytest.mark.parametrize(("grace_s", "waits_s"), [(25.0, "30"), (120.0, "125")])
def test_torchrun_waits_for_a_last_checkpoint_as_long_as_the_run_does(
    ray: Dashboard, tmp_path: Path, grace_s: float, waits_s: str
):
    """Its own patience are 30 s, however long the ranks may take."""

    said = ray.answer

    def answer(method: str, path: str, body: bytes) -> tuple[int, object]:
        (tmp_path / "result.json").write_text("{}")
        for job in ray.jobs.values():
            job["status"] = "SUCCEEDED"
        return said(method, path, body)

    ray.answer = answer
    terms = Terms(launch=LAUNCH.model_copy(update={"ray_address": ray.url}), stop_grace_s=grace_s)
    run_trainer("none", tmp_path, {}, terms, print)
    assert f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={waits_s}\n" in (tmp_path / "node.sh").read_text()


def test_torchrun_obeys_that_variable(tmp_path: Path):
    (tmp_path / "rank.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: print('told', flush=True))\n"
        "print('begun', flush=True)\nwhile True: time.sleep(0.1)\n"
    )
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", str(tmp_path / "rank.py")]
    env = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1", "MASTER_PORT": str(free_port())}
    log = tmp_path / "log"
    with log.open("wb") as output:
        launcher = subprocess.Popen(argv, env=env, stdout=output, stderr=output)
    try:
        wait_for(lambda: "begun" in log.read_text(), 60)
        launcher.terminate()
        begin = time.monotonic()
        assert launcher.wait(20) and time.monotonic() - begin > 1
        assert "told" in log.read_text() and "forcefully exiting via" in log.read_text()
    finally:
        launcher.kill()


def test_a_frozen_rank_is_killed_with_its_launcher(tmp_path: Path):
    """torchrun starts each rank in a session of its own, and a frozen one takes no SIGTERM."""
    node = Node({"folder": str(tmp_path)}, 0)
    node.child = subprocess.Popen(["bash", "-c", "setsid sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    rank = int(node.child.stdout.readline())
    os.kill(rank, signal.SIGSTOP)
    node.stop(signal.SIGKILL)
    assert node.child.wait(10) == -signal.SIGKILL
    wait_for(lambda: not runs(rank), 10)
