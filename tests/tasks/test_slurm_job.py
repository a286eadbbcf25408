"""How the end of a SLURM job is told, and what is said without SLURM; real jobs are in train/test_slurm.py."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tasks import errors, slurm
from tasks import followed_job as subject
from tasks.launch_script import STARTS
from tasks.slurm_report import JobReport, read_accounting, read_job
from tasks.specs import LaunchSpec
from tasks.supervision import Job
from tasks.train.run import check_launch
from tasks.trainer_job import Terms, run_trainer
from tests.commands import write_commands
from tests.tasks.train.runs import SPEC

LAUNCH = LaunchSpec(launcher="slurm", nodes=2, time_limit="60")
TABLE = """\
[rank1] about to fail
[rank0] all is well
Root Cause (first observed failure):
[0]:
  time      : 2026-11-21_22:50:{}
  host      : n{}
  rank      : {} (local_rank: 0)
  exitcode  : {} (pid: 9)
  error_file: <N/A>
"""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "nodes").mkdir()
    for number in range(2):
        (tmp_path / "nodes" / str(number)).write_text("7\n")
    whole = tmp_path / "checkpoints/checkpoint-10"
    whole.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"):
        (whole / name).write_text("x")
    (whole / "COMPLETE.json").write_text("{}")
    return Job(argv=[], env={}, folder=tmp_path, stall_timeout_s=9.0)


def tell(job: Job, rank: int, kind: str, message: str) -> None:
    name = f"failure_{rank}.json" if rank else "failure.json"
    (job.folder / name).write_text(json.dumps({"error": kind, "message": message}))


@pytest.mark.parametrize(
    ("state", "code", "error", "said"),
    [
        (
            "CANCELLED",
            "0:15",
            errors.TrainingError,
            r"cancelled \(scancel\), not by Tatara: checkpoint-10 is kept; run",
        ),
        ("NODE_FAIL", "0:0", errors.TransientError, "a node was lost: checkpoint-10 is kept"),
        ("PREEMPTED", "0:0", errors.TransientError, "a job of higher priority took its nodes"),
        ("TIMEOUT", "0:0", errors.TransientError, "its time limit was over"),
        ("OUT_OF_MEMORY", "0:125", errors.CapacityError, "ran out of memory: .*raise TrainSpec.launch.memory"),
        ("FAILED", "66:0", errors.SpecError, "put TATARA_HOME, this checkout and its Python on storage"),
        ("FAILED", "67:0", errors.SpecError, r"within the time limit \(60\) no checkpoint was written"),
        ("FAILED", "1:0", errors.TrainingError, "exit code 1:0: checkpoint-10 is kept, the next try goes on"),
        ("", "", errors.TrainingError, "ended as forgotten by SLURM"),
    ],
)
def test_each_end_is_an_error_of_its_own_class(job: Job, state: str, code: str, error: type[Exception], said: str):
    """Also where rank 0 was told to stop, which alone would be tried again."""
    if state == "CANCELLED":
        tell(job, 0, "TransientError", "the trainer was told to stop (SIGTERM)")
    report = JobReport(job_id="7", state=state, exit_code=code, nodes="n[1-2]")
    with pytest.raises(error, match=said) as caught:
        subject.raise_end(report, job, LAUNCH)
    assert type(caught.value) is error
    assert "SLURM job 7" in str(caught.value)


@pytest.mark.parametrize("state", ["TIMEOUT", "DEADLINE"])
def test_a_time_limit_in_which_nothing_is_saved_is_not_tried_again(job: Job, state: str):
    shutil.rmtree(job.folder / "checkpoints")
    report = JobReport(job_id="7", state=state, exit_code="0:0", nodes="n[1-2]")
    with pytest.raises(errors.SpecError, match=r"within the time limit \(60\) no checkpoint was written, so it would"):
        subject.raise_end(report, job, LAUNCH)


FAILED = JobReport(job_id="7", state="FAILED", exit_code="1:0", nodes="n[1-2]")


def test_the_rank_that_failed_first_is_believed_and_not_those_that_it_took_along(job: Job):
    job.log.write_text(TABLE.format("51", 1, 0, 1) + TABLE.format("50", 2, 1, 1))
    tell(job, 0, "TransientError", "the trainer was told to stop (SIGTERM)")
    tell(job, 1, "OutOfMemoryError", "the GPU ran out of memory")
    with pytest.raises(errors.OutOfMemoryError, match=r"the GPU ran out of memory .*rank 1 on n2 ended first"):
        subject.raise_end(FAILED, job, LAUNCH)


def test_an_out_of_memory_is_believed_though_nccl_ends_another_rank_first(job: Job):
    job.log.write_text(TABLE.format("51", 2, 1, 1) + TABLE.format("50", 1, 0, -6))
    tell(job, 1, "OutOfMemoryError", "the GPU ran out of memory")
    with pytest.raises(errors.OutOfMemoryError, match="the GPU ran out of memory"):
        subject.raise_end(FAILED, job, LAUNCH)


def test_a_killed_rank_says_nothing_and_its_lines_are_shown(job: Job):
    job.log.write_text(TABLE.format("50", 1, 0, 1) + TABLE.format("51", 2, 1, -9))
    tell(job, 0, "TrainingError", "RuntimeError('Connection closed by peer')")
    with pytest.raises(errors.TrainingError, match=r"rank 1 on n2 ended first \(killed by SIGKILL\)") as caught:
        subject.raise_end(FAILED, job, LAUNCH)
    assert str(caught.value).endswith("Its last lines:\nabout to fail\nabout to fail")


def test_what_an_earlier_start_of_the_job_left_in_the_log_is_not_believed(job: Job):
    job.log.write_text(TABLE.format("50", 2, 1, -9) + f"{STARTS}7-1 on n[1-2]\n" + TABLE.format("59", 1, 0, 1))
    tell(job, 0, "SpecError", "no such layer")
    with pytest.raises(errors.SpecError, match="no such layer"):
        subject.raise_end(FAILED, job, LAUNCH)


def test_a_job_that_ended_before_a_node_saw_its_folder_says_so(job: Job):
    (job.folder / "nodes/1").write_text("6\n")  # of another job
    with pytest.raises(errors.SpecError, match=r"node 1 of 0 to 1 did not show that it sees"):
        subject.raise_end(FAILED, job, LAUNCH)


def test_without_slurm_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.MissingError, match=r"sbatch is not on this machine's PATH.*choose launcher='local'"):
        slurm.require_commands()


def test_no_trainer_starts_beside_a_job_that_slurm_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """It tells of the job, and then its controller is away."""
    tools, folder = tmp_path / "tools", tmp_path / "adapter"
    folder.mkdir()
    says = {
        "squeue": "echo 7",
        "scontrol": "echo JobId=7 JobName=x JobState=RUNNING NodeList=n1",
        "scancel": "echo slurm_kill_job error: Unable to contact slurm controller >&2; exit 1",
    }
    write_commands(tools, says)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    (folder / "slurm_job.lock").touch()
    terms = Terms(stop_grace_s=0.1)
    with pytest.raises(errors.TransientError, match=r"SLURM job 7 may still run .*`scancel 7`, and run this again"):
        run_trainer("none", folder, {}, terms, print)
    assert not (folder / "process.json").exists()
    (folder / "result.json").write_text('{"num_steps": 3}')  # nobody would write beside it
    assert run_trainer("none", folder, {}, terms, print) == {"num_steps": 3}
    assert "SLURM job 7 may still run" in caplog.text


def test_two_stores_have_two_jobs_and_a_moved_name_is_short(tmp_path: Path):
    names = [subject.job_name(tmp_path / home / "adapter/0123456789abcdef") for home in ("a", "b")]
    assert names[0] != names[1] and all(name.startswith("tatara-01234567-") for name in names)


@pytest.mark.parametrize(
    ("state", "waits", "runs", "over"),
    [
        ("PENDING", True, False, False),
        ("RUNNING", False, True, False),
        ("COMPLETING", False, False, False),
        ("SUSPENDED", False, False, False),
        ("COMPLETED", False, False, True),
        ("NODE_FAIL", False, False, True),
        ("", False, False, True),
    ],
)
def test_states(state: str, waits: bool, runs: bool, over: bool):
    report = read_job(f"JobId=7 JobName=x ReqNodeList=n9 JobState={state} NodeList=n[1-2]")
    assert (report.is_waiting, report.is_running, report.is_over) == (waits, runs, over)
    assert report.nodes == "n[1-2]"


def test_accounting_of_a_requeued_job_is_its_last_line():
    assert read_accounting("7", "REQUEUED|0:0|n1\nCOMPLETED|0:0|n2\n").nodes == "n2"
    assert read_accounting("7", "Slurm accounting storage is disabled\n").state == ""


def test_a_launch_is_looked_at_before_anything_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    spec = SPEC.model_copy(update={"gradient_accumulation": 2, "launch": LAUNCH})
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_launch(SPEC, tmp_path) == ""
    with pytest.raises(errors.MissingError, match="sbatch is not on"):
        check_launch(spec, tmp_path)
    with pytest.raises(errors.SpecError, match="a step has 1 batches"):
        check_launch(spec.model_copy(update={"gradient_accumulation": 1}), tmp_path)
    with pytest.raises(errors.SpecError, match="move TATARA_HOME"):
        check_launch(spec, tmp_path / "it's")
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho slurm 1.0")
    (tmp_path / "sbatch").chmod(0o755)
    assert check_launch(spec, tmp_path) == "launch: slurm 1.0, 2 machines with 1 processes each"
