"""What is submitted to a Ray cluster, and how its end is told, against a stand-in; real jobs are in tests/ppo."""

import json
import subprocess
from pathlib import Path

import pytest

from tasks import errors, ray_follow
from tasks import ray_job as subject
from tasks.followed_job import raise_end, run_queued
from tasks.launch_script import BEGINS, JOIN_OVER, STARTS, Work, first_argv, render_join, render_node
from tasks.ray_driver import DRIVER, LOST_NODE
from tasks.specs import LaunchSpec
from tasks.supervision import Job
from tasks.train.run import check_launch
from tasks.trainer_job import Terms, run_trainer
from tests.ports import free_port
from tests.ray_dashboard import Dashboard
from tests.tasks.train.runs import SPEC


@pytest.fixture
def folder(tmp_path: Path):
    made = tmp_path / "it's a home" / "adapter" / "0123456789abcdef"
    made.mkdir(parents=True)
    return made


def launch(ray: Dashboard, **changes: object) -> LaunchSpec:
    values = {"launcher": "ray", "nodes": 2, "ray_address": ray.url, "poll_s": 0.02, "setup": ("echo hello",)}
    return LaunchSpec.model_validate(values | changes)


def queue(
    ray: Dashboard,
    folder: Path,
    variables: dict[str, str] | None = None,
    *,
    grace_s: float = 27.0,
    heartbeat_timeout_s: float = 300.0,
    **changes: object,
) -> subject.RayQueue:
    shown, needs = subject.split_variables(variables or {})
    work = Work(name="n", module="tasks.train.worker", folder=str(folder), root="/", python="python", variables=shown)
    times = {"stall_timeout_s": 9.0, "heartbeat_timeout_s": heartbeat_timeout_s, "grace_s": grace_s}
    job = Job(argv=[], env=dict(variables or {}), folder=folder, **times)
    return subject.RayQueue(job, launch(ray, **changes), work, needs)


def test_no_secret_is_submitted_or_written_down(ray: Dashboard, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token-of-the-cluster")
    queue(ray, folder, {"WANDB_API_KEY": "key-of-wandb", "WANDB_PROJECT": "mine"}).start()
    (sent,) = ray.submissions
    written = "".join(path.read_text() for path in folder.rglob("*") if path.is_file())
    for secret in ("key-of-wandb", "token-of-the-cluster"):
        assert secret not in json.dumps(sent) + written
    assert sent["runtime_env"] == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "47"}}
    assert "export WANDB_PROJECT=mine" in (folder / "node.sh").read_text()
    assert json.loads((folder / "ray_plan.json").read_text())["needs"] == ["WANDB_API_KEY"]  # each node has it itself


def test_the_entrypoint_is_read_by_a_shell_as_it_was_meant(ray: Dashboard, folder: Path, tmp_path: Path):
    python = tmp_path / "py thon"
    python.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/told\n')
    python.chmod(0o755)
    queue(ray, folder, ray_python=f"'{python}'").start()
    (sent,) = ray.submissions
    assert subprocess.run(["sh", "-c", sent["entrypoint"]], check=False).returncode == 0
    assert (tmp_path / "told").read_text().splitlines() == ["-u", f"{folder}/ray_driver.py", f"{folder}/ray_plan.json"]
    (folder / "ray_driver.py").unlink()
    done = subprocess.run(["sh", "-c", sent["entrypoint"]], check=False, capture_output=True, text=True)
    assert done.returncode == 66 and f"the head does not see {folder}" in done.stderr


def test_one_job_runs_and_another_setting_is_another_one(ray: Dashboard, folder: Path):
    job_id = queue(ray, folder).start()
    assert queue(ray, folder).start() == job_id and len(ray.submissions) == 1
    second = queue(ray, folder, environment={"NCCL_DEBUG": "INFO"}).start()
    assert ray.jobs[job_id]["status"] == "STOPPED"
    assert (job_id[-2:], second[-2:], len(ray.submissions)) == ("-1", "-2", 2)
    queue(ray, folder).end_left()
    assert ray.jobs[second]["status"] == "STOPPED"


def test_a_job_that_moved_to_another_cluster_is_stopped_on_the_first(ray: Dashboard, folder: Path):
    first = queue(ray, folder).start()
    other = Dashboard(free_port())
    try:
        queue(other, folder).start()
        assert ray.jobs[first]["status"] == "STOPPED" and len(other.submissions) == 1
    finally:
        other.server.shutdown()
        other.server.server_close()


def test_no_trainer_starts_beside_a_job_that_may_still_run(
    ray: Dashboard, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    job_id = queue(ray, folder).start()
    monkeypatch.setattr(subject, "_LOST_AFTER_S", 0.2)
    monkeypatch.setattr(ray_follow, "CANCEL", ray_follow.Patience(poll_s=0.01, lost_after_s=0.1))
    ray.faults = ["cut"] * 100
    other = Dashboard(free_port())
    try:
        for begin in (lambda: run_trainer("none", folder, {}, Terms(), print), queue(other, folder).start):
            with pytest.raises(
                errors.TransientError, match=rf"{job_id} may still run.*remove \S.*/ray_job\.json and run"
            ):
                begin()
    finally:
        other.server.shutdown()
        other.server.server_close()
    assert not (folder / "process.json").exists() and not other.submissions
    assert "asking again for 0.2 s" in caplog.text
    (folder / "result.json").write_text('{"num_steps": 3}')  # nobody would write beside it
    assert run_trainer("none", folder, {}, Terms(), print) == {"num_steps": 3}
    assert f"{job_id} may still run: `ray job stop" in caplog.text


def test_a_dashboard_that_is_away_for_a_moment_is_waited_for(
    ray: Dashboard, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    job_id = queue(ray, folder).start()
    monkeypatch.setattr(subject, "_LOST_AFTER_S", 0.5)
    ray.faults = ["cut"]
    subject.end_left(folder, 0.0)
    assert ray.jobs[job_id]["status"] == "STOPPED"


def test_a_job_that_does_not_end_keeps_others_from_its_folder(
    ray: Dashboard, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    job_id = queue(ray, folder).start()
    monkeypatch.setattr(subject, "_KILL_AFTER_S", 0.1)
    ray.is_stubborn = True
    with pytest.raises(errors.TransientError, match=rf"{job_id} still runs .*remove \S.*/ray_job\.json"):
        subject.end_left(folder, 0.0)
    with pytest.raises(errors.TransientError, match=rf"{job_id} still runs"):
        queue(ray, folder, environment={"NCCL_DEBUG": "INFO"}, grace_s=0.0).start()
    assert len(ray.submissions) == 1
    ray.token = "another"
    with pytest.raises(errors.TokenError, match=r"remove \S.*/ray_job\.json"):
        subject.end_left(folder, 0.0)


def test_a_cluster_whose_job_has_ended_need_not_be_there_any_more(
    ray: Dashboard, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    waiting = queue(ray, folder)
    job_id = waiting.start()
    ray.jobs[job_id] |= {"status": "STOPPED"}
    waiting.look(job_id)
    ray.asked.clear()
    subject.end_left(folder, 0.0)
    assert not ray.asked
    second = queue(ray, folder).start()
    subject.end_left(folder, 0.0)  # this one runs
    assert ray.jobs[second]["status"] == "STOPPED"
    third = queue(ray, folder)
    ray.jobs[job_id := third.start()] |= {"status": "SUCCEEDED"}
    third.look(job_id)
    assert queue(ray, folder).start() == job_id and len(ray.submissions) == 4  # its result was lost
    subject.end_left(folder, 0.0)
    assert ray.jobs[job_id]["status"] == "STOPPED"


@pytest.mark.parametrize("fault", ["cut", "lost", 503])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_lost_answer_leaves_one_job(ray: Dashboard, folder: Path, fault: str | int, at: int):
    ray.faults = [None] * at + [fault]
    queue(ray, folder).start()
    assert len(ray.submissions) == 1


def test_states(ray: Dashboard, folder: Path):
    waiting = queue(ray, folder)
    job_id = waiting.start()
    seen = waiting.look(job_id)
    assert seen and seen.say() == f"Ray job {job_id} is queued (its nodes are not free)"
    (folder / "nodes").mkdir()
    for name in ("driver", "0", "1"):
        (folder / "nodes" / name).write_text(f"{job_id}\n")
    seen = waiting.look(job_id)
    assert seen and seen.is_running
    ray.faults = ["cut"]
    assert waiting.look(job_id) is None
    job = Job(argv=[], env={}, folder=folder, stall_timeout_s=9.0)
    for status, code, error, said in (
        ("STOPPED", None, errors.TrainingError, "by `ray job stop`.*, not by Tatara"),
        ("FAILED", LOST_NODE, errors.TransientError, "a node was lost"),
        ("FAILED", None, errors.TransientError, r"its cluster gave it up \(out of memory\)"),
        ("FAILED", 1, errors.TrainingError, "exit code 1: .*the next try goes on"),
    ):
        ray.jobs[job_id] |= {"status": status, "driver_exit_code": code, "message": "out of memory"}
        seen = waiting.look(job_id)
        assert seen and seen.is_over
        with pytest.raises(error, match=said) as caught:
            raise_end(seen, job, launch(ray))
        assert type(caught.value) is error
    del ray.jobs[job_id]  # the cluster was started anew
    seen = waiting.look(job_id)
    assert seen and seen.is_lost


def test_a_job_that_goes_on_after_its_result_is_ended_and_that_is_no_failure(
    ray: Dashboard, folder: Path, caplog: pytest.LogCaptureFixture
):
    """A rank that hangs in the last collective, or in an exit hook."""
    (folder / "nodes").mkdir()
    hangs = queue(ray, folder, heartbeat_timeout_s=0.5)
    (folder / "result.json").write_text("{}")
    end = run_queued(hangs._job, launch(ray), hangs, print)
    assert ray.jobs[end.job_id]["status"] == "STOPPED" and not end.is_over
    assert "after its result was written: it is ended, the result is whole" in caplog.text


def test_what_the_driver_says_itself_is_believed(ray: Dashboard, folder: Path):
    """Also before a node has shown that it sees the folder."""
    (folder / "failure.json").write_text(json.dumps({"error": "CapacityError", "message": "the cluster did not give"}))
    report = subject.JobReport(job_id="j", system="Ray", state="FAILED", exit_code="1")
    with pytest.raises(errors.CapacityError, match="the cluster did not give"):
        raise_end(report, Job(argv=[], env={}, folder=folder, stall_timeout_s=9.0), launch(ray))


TABLE = """\
{}tatara-x-1 on a, b
[rank1] ValueError: an old fault
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  host      : a
  rank      : 1 (local_rank: 0)
  exitcode  : 1 (pid: 9)
  error_file: <N/A>
"""


@pytest.mark.parametrize("kind", ["TransientError", "CapacityError"])
def test_a_job_that_fails_before_its_start_is_not_told_as_the_one_before(ray: Dashboard, folder: Path, kind: str):
    job = Job(argv=[], env={}, folder=folder, stall_timeout_s=9.0)
    report = subject.JobReport(job_id="tatara-x-2", system="Ray", state="FAILED", exit_code="1")
    log = TABLE.format(STARTS) + f"{BEGINS}tatara-x-2\nTraceback ...\nRuntimeError: Version mismatch\n"
    job.log.write_text(log)
    with pytest.raises(errors.TrainingError, match="Version mismatch") as caught:
        raise_end(report, job, launch(ray))
    assert "old fault" not in str(caught.value) and "rank 1" not in str(caught.value)
    told = {"error": kind, "message": "earlier processes still run"}
    (folder / "failure.json").write_text(json.dumps(told))
    with pytest.raises(
        errors.TataraError, match=r"^earlier processes still run \(Ray job tatara-x-2 .*code 1; output"
    ) as caught:
        raise_end(report, job, launch(ray))
    assert type(caught.value).__name__ == kind
    job.log.write_text(log + TABLE.format(STARTS))  # it did start: what the driver says counts more than ranks do
    (folder / "failure.json").write_text(json.dumps(told | {"by": DRIVER}))
    with pytest.raises(errors.TataraError, match=r"^earlier processes still run") as caught:
        raise_end(report, job, launch(ray))
    assert type(caught.value).__name__ == kind and "rank 1" not in str(caught.value)


def test_a_python_that_is_not_there_and_a_head_that_sees_nothing_are_said(ray: Dashboard, folder: Path):
    waiting = queue(ray, folder)
    job_id = waiting.start()
    ray.jobs[job_id] |= {"status": "FAILED", "message": "sh: python3: not found", "driver_exit_code": 127}
    with pytest.raises(errors.SpecError, match=r"name a Python there that has ray.*python3: not found"):
        waiting.look(job_id)
    ray.jobs[job_id] |= {"driver_exit_code": 66}
    with pytest.raises(errors.SpecError, match=r"the head of \S+ does not see .*: put TATARA_HOME"):
        waiting.look(job_id)


def test_a_dashboard_that_stays_away_leaves_the_job_to_the_next_try(
    ray: Dashboard, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    waiting = queue(ray, folder)
    job_id = waiting.start()
    monkeypatch.setattr(subject, "_LOST_AFTER_S", 0.0)
    ray.faults = ["cut"]
    with pytest.raises(errors.TransientError, match=r"did not answer for \d+ s"):
        waiting.look(job_id)
    assert ray.jobs[job_id]["status"] == "RUNNING"


def test_a_cluster_is_looked_at_before_anything_is_downloaded(
    ray: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = SPEC.model_copy(update={"gradient_accumulation": 2, "launch": launch(ray)})
    assert check_launch(spec, tmp_path).startswith(f"launch: Ray 2.60.0, cluster: 2 nodes at {ray.url}, 2 with 1 CPU")
    ray.alive = 1
    with pytest.raises(errors.CapacityError, match=r"needs 2 nodes with 1 CPU each, but .* has 1 node: one with 2 CPU"):
        check_launch(spec, tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(errors.MissingError, match=r"set TrainSpec\.launch\.ray_address or RAY_ADDRESS"):
        check_launch(spec.model_copy(update={"launch": launch(ray, ray_address="")}), tmp_path)
    away = launch(ray, ray_address=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(errors.UnavailableError):
        check_launch(spec.model_copy(update={"launch": away}), tmp_path)


def test_what_a_node_runs_has_setup_variables_and_its_number(ray: Dashboard, tmp_path: Path):
    """Also on the first machine of a run without a queue."""
    trainer = tmp_path / "python"
    trainer.write_text('#!/bin/bash\necho "$NCCL_DEBUG $TORCH_NCCL_DUMP_ON_TIMEOUT $*"\n')
    trainer.chmod(0o755)
    work = Work(name="n", module="m", folder=str(tmp_path), root="/", python=str(trainer))
    spec = launch(ray, environment={"NCCL_DEBUG": "INFO"})
    at = {"TATARA_NODE": "0", "TATARA_HEAD": "h:7", "TATARA_RUN": "r", "TATARA_LOGS": "/l", "PATH": "/usr/bin:/bin"}
    at["TATARA_ADDRESS"] = "10.0.0.7"
    said = subprocess.run(["bash", "-c", render_node(spec, work)], env=at, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("hello\nINFO 1 -m torch.distributed.run --nnodes=2")
    assert (
        "--rdzv-id=r --rdzv-conf=is_host=1,read_timeout=600 --log-dir=/l/0 --local-addr=10.0.0.7 -m m " in said.stdout
    )
    by_hand = spec.model_copy(update={"launcher": "torchrun", "address": "h"})
    said = subprocess.run(first_argv(by_hand, work), env=at, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("hello\nINFO 1 -m torch.distributed.run --nnodes=2") and "is_host=1" in said.stdout


def test_join_ends_when_the_run_was_cancelled(ray: Dashboard, tmp_path: Path):
    trainer = tmp_path / "python"
    trainer.write_text(f"#!/bin/bash\ntouch {tmp_path}/{JOIN_OVER}; exit 1\n")
    trainer.chmod(0o755)
    (tmp_path / "job.json").write_text("{}")
    work = Work(name="n", module="m", folder=str(tmp_path), root="/", python=str(trainer))
    script = render_join(launch(ray, launcher="torchrun", address="h"), work)
    done = subprocess.run(["bash", "-c", script, "join", "1"], timeout=30, capture_output=True, text=True, check=False)
    assert "the run was cancelled" in done.stdout
