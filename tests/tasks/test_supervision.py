"""A supervised job: its lines and records, its silence, and a parent that was killed."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks import files, processes
from tasks import supervision as subject
from tasks.artifacts import ArtifactStore, TrainedAdapter
from tasks.processes import Program
from tasks.supervision import Job, Tail
from tests.waiting import runs, wait_for

ROOT = Path(__file__).resolve().parents[2]
ENV = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def _job(folder: Path, code: str, **more: Any) -> Job:
    return Job(
        argv=[sys.executable, "-c", code, str(folder)], env=ENV, folder=folder, **{"stall_timeout_s": 20, **more}
    )


STEPS = (
    "import json, sys, time; from pathlib import Path; folder = Path(sys.argv[1])\n"
    "for step in range({count}):\n"
    "    with (folder / 'metrics.jsonl').open('a') as out: out.write(json.dumps(dict(step=step)) + '\\n')\n"
    "    print('step', step, flush=True); time.sleep({pause})\n"
)


def test_supervised_job_reports_each_record_once_and_each_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    seen: list[dict[str, Any]] = []
    with caplog.at_level(logging.INFO, "tasks.supervision"):
        subject.supervise(_job(tmp_path, STEPS.format(count=5, pause=0.05)), seen.append)
    assert seen == [{"step": step} for step in range(5)]
    assert [m for m in caplog.messages if m.startswith("step")] == [f"step {step}" for step in range(5)]


def test_job_of_a_killed_parent_is_followed_and_not_started_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    code = STEPS.format(count=12, pause=0.2)
    job = _job(tmp_path, code)
    parent = (
        "import sys; from pathlib import Path; from tasks.supervision import Job, supervise\n"
        f"supervise(Job(argv={job.argv!r}, env={ENV!r}, folder=Path({str(tmp_path)!r}), stall_timeout_s=20), print)"
    )
    first = subprocess.Popen([sys.executable, "-c", parent], env=ENV, stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists())
    first.kill()
    first.wait()
    identity = processes.find_alive(tmp_path / "process.json")
    assert identity is not None
    seen: list[dict[str, Any]] = []
    with caplog.at_level(logging.INFO, "tasks.supervision"):
        subject.supervise(job, seen.append)
    assert f"attached to pid {identity.pid}, which an earlier try left running" in caplog.messages
    steps = [record["step"] for record in seen]
    assert steps and steps == list(range(steps[0], 12))
    written = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == list(range(12))  # one trainer wrote them all


def test_parent_killed_before_it_wrote_the_pid_leaves_one_trainer(tmp_path: Path):
    """SIGKILL between the start of the trainer and process.json: the next try follows that very process."""
    job = _job(tmp_path, STEPS.format(count=10, pause=0.2))
    parent = (
        "import os, signal; from pathlib import Path; from tasks import files\n"
        "from tasks.supervision import Job, supervise\n"
        "files.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"supervise(Job(argv={job.argv!r}, env={ENV!r}, folder=Path({str(tmp_path)!r}), stall_timeout_s=20), print)"
    )
    died = subprocess.run([sys.executable, "-c", parent], env=ENV, check=False)
    assert died.returncode == -signal.SIGKILL and not job.identity_file.exists()
    seen: list[dict[str, Any]] = []
    subject.supervise(job, seen.append)
    written = [json.loads(line)["step"] for line in job.metrics.read_text().splitlines()]
    assert written == list(range(10))  # one trainer wrote them all
    assert (tmp_path / "output.log").read_text().count("step 0\n") == 1
    assert job.identity_file.exists()


def test_job_with_another_command_is_stopped_and_started_anew(tmp_path: Path):
    job = _job(tmp_path, STEPS.format(count=1, pause=0), grace_s=2)
    program = Program(
        argv=tuple(SLEEP), variables=ENV, identity_file=job.identity_file, log=job.log, digest="an older command"
    )
    old = processes.start_detached(program)
    seen: list[dict[str, Any]] = []
    subject.supervise(job, seen.append)
    assert not runs(old.pid)
    assert seen == [{"step": 0}]


def test_stalled_job_is_stopped(tmp_path: Path):
    job = _job(tmp_path, "import time; print('begin', flush=True); time.sleep(60)", stall_timeout_s=0.6, grace_s=2)
    with pytest.raises(TimeoutError, match=r"pid \d+: no progress for 1 s: it hangs"):
        subject.supervise(job, print)
    pid = json.loads((tmp_path / "process.json").read_text())["pid"]
    assert not runs(pid)


def test_sign_of_life_keeps_a_slow_job(tmp_path: Path):
    seen: list[dict[str, Any]] = []
    subject.supervise(_job(tmp_path, STEPS.format(count=6, pause=0.3), stall_timeout_s=1.2), seen.append)
    assert len(seen) == 6


def test_failing_listener_stops_the_job(tmp_path: Path):
    def refuse(record: dict[str, Any]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        subject.supervise(_job(tmp_path, STEPS.format(count=50, pause=0.5), grace_s=2), refuse)
    assert processes.find_alive(tmp_path / "process.json") is None


def test_torn_last_line_waits_for_its_rest(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    tail = Tail(path)
    assert tail.lines() == []
    with path.open("ab") as out:
        out.write('{"a": 1}\n{"b": "祭'.encode()[:-1])
        out.flush()
        assert tail.lines() == ['{"a": 1}']
        assert tail.lines() == []
        out.write("祭".encode()[-1:] + b'"}\n')
        out.flush()
        assert tail.lines() == ['{"b": "祭"}']
    assert tail.lines() == []


def test_tail_from_end_skips_what_is_there(tmp_path: Path):
    path = tmp_path / "log"
    path.write_text("old\n")
    tail = Tail(path, from_end=True)
    with path.open("a") as out:
        out.write("new\n")
    assert tail.lines() == ["new"]


def test_file_that_was_replaced_is_read_anew(tmp_path: Path):
    """A resumed trainer drops the records after its checkpoint: what it writes then must be read from line starts."""
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(9)))
    tail = Tail(path, from_end=True)
    from tasks.metrics import truncate_metrics

    truncate_metrics(path, 3)
    with path.open("a") as out:
        out.write("".join(json.dumps({"step": step, "loss": 0.12345}) + "\n" for step in range(4, 12)))
    assert [json.loads(line)["step"] for line in tail.lines()] == list(range(12))
    assert tail.lines() == []


def test_trainers_that_nobody_watches_are_ended_and_others_left(tmp_path: Path):
    """`tatara down` in the middle of a training: the flow is gone, its trainer would go on for hours."""
    pids: dict[str, int] = {}
    for name in ("watched", "unwatched"):
        job = _job(tmp_path / "adapter" / name, "import time; time.sleep(60)")
        program = Program(
            argv=tuple(job.argv), variables=ENV, identity_file=job.identity_file, log=job.log, digest="train"
        )
        pids[name] = processes.start_detached(program).pid
    with files.lock_file(tmp_path / "adapter/.watched.lock"):  # as the claim of a flow run holds it
        assert subject.stop_unwatched(tmp_path, grace_s=5) == ["adapter/unwatche"]
        assert runs(pids["watched"]) and not runs(pids["unwatched"])
    assert subject.stop_unwatched(tmp_path, grace_s=5) == ["adapter/watched"]
    assert subject.stop_unwatched(tmp_path) == []


def test_claim_is_locked_where_it_is_looked_for(tmp_path: Path):
    store = ArtifactStore(tmp_path)
    with store.claim(TrainedAdapter, "0123456789abcdef0123") as claim:
        assert processes.is_locked(claim.folder.parent / f".{claim.folder.name}.lock")
