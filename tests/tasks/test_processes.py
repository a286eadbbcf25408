"""Children outlive a killed parent, are found again, are never confused, and end with all they started."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tasks import processes as subject
from tasks.processes import Job, Tail

ROOT = Path(__file__).resolve().parents[2]
ENV = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def _runs(pid: int) -> bool:
    """Look at the process ourselves; a zombie does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _wait_for(condition: Any, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_started_process_is_recognised_and_its_output_kept(tmp_path: Path):
    argv = [sys.executable, "-c", "import os; print(os.getsid(0) == os.getpid(), os.environ['WORD'], flush=True)"]
    identity = subject.start_detached(argv, {**ENV, "WORD": "祭り"}, tmp_path / "log", tmp_path / "id.json")
    _wait_for(lambda: subject.find_alive(tmp_path / "id.json") is None)
    assert (tmp_path / "log").read_text() == "True 祭り\n"
    assert not identity.is_alive()
    identity = subject.start_detached(SLEEP, ENV, tmp_path / "log", tmp_path / "id.json")
    assert subject.find_alive(tmp_path / "id.json") == identity
    subject.stop_group(identity, grace_s=5)
    assert subject.find_alive(tmp_path / "id.json") is None


def test_missing_or_torn_identity_names_nobody(tmp_path: Path):
    assert subject.find_alive(tmp_path / "none.json") is None
    for text in ("", '{"pid": 1', "[]", '{"pid": 1}', "null"):
        (tmp_path / "id.json").write_text(text)
        assert subject.find_alive(tmp_path / "id.json") is None


def test_recycled_pid_is_neither_trusted_nor_killed(tmp_path: Path):
    stranger = subprocess.Popen(SLEEP)
    try:
        started = subject._start_ticks(stranger.pid)
        assert started is not None
        (tmp_path / "id.json").write_text(json.dumps({"pid": stranger.pid, "started": started - 1, "argv": "x"}))
        assert subject.find_alive(tmp_path / "id.json") is None
        old = subject.Identity(pid=stranger.pid, started=started - 1, argv_digest="x")
        subject.stop_group(old, grace_s=0.1)
        time.sleep(0.1)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_child_outlives_a_killed_parent_and_is_found(tmp_path: Path):
    code = (
        "import os, sys, time; from pathlib import Path; from tasks import processes\n"
        "here = Path(sys.argv[1])\n"
        "argv = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "processes.start_detached(argv, dict(os.environ), here / 'log', here / 'id.json')\n"
        "print('started', flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=ENV, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "started\n"
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    found = subject.find_alive(tmp_path / "id.json")
    assert found is not None and _runs(found.pid)
    subject.stop_group(found, grace_s=5)
    assert not _runs(found.pid)


@pytest.mark.parametrize("trap", ["", "trap '' TERM; "])
def test_stop_ends_grandchildren_too(tmp_path: Path, trap: str):
    """With a trap, SIGTERM is ignored by all of them and SIGKILL has to do it."""
    pids = tmp_path / "pids"
    argv = ["bash", "-c", f"{trap}sleep 60 & echo $! >> {pids}; (sleep 60 & echo $! >> {pids}; wait) & wait; sleep 60"]
    identity = subject.start_detached(argv, ENV, tmp_path / "log", tmp_path / "id.json")
    _wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    grandchildren = [int(pid) for pid in pids.read_text().split()]
    assert all(map(_runs, grandchildren))
    subject.stop_group(identity, grace_s=0.4)
    assert not any(map(_runs, [identity.pid, *grandchildren]))


def test_orphans_of_a_dead_leader_are_ended(tmp_path: Path):
    pids = tmp_path / "pids"
    argv = ["bash", "-c", f"sleep 60 & echo $! > {pids}"]
    identity = subject.start_detached(argv, ENV, tmp_path / "log", tmp_path / "id.json")
    _wait_for(lambda: subject.find_alive(tmp_path / "id.json") is None)
    orphan = int(pids.read_text())
    assert _runs(orphan)
    subject.stop_group(identity, grace_s=5)
    assert not _runs(orphan)


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
    with caplog.at_level(logging.INFO, "tasks.processes"):
        subject.supervise(_job(tmp_path, STEPS.format(count=5, pause=0.05)), seen.append)
    assert seen == [{"step": step} for step in range(5)]
    assert [m for m in caplog.messages if m.startswith("step")] == [f"step {step}" for step in range(5)]


def test_job_of_a_killed_parent_is_followed_and_not_started_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    code = STEPS.format(count=12, pause=0.2)
    job = _job(tmp_path, code)
    parent = (
        "import sys; from pathlib import Path; from tasks.processes import Job, supervise\n"
        f"supervise(Job(argv={job.argv!r}, env={ENV!r}, folder=Path({str(tmp_path)!r}), stall_timeout_s=20), print)"
    )
    first = subprocess.Popen([sys.executable, "-c", parent], env=ENV, stdout=subprocess.DEVNULL)
    _wait_for(lambda: (tmp_path / "metrics.jsonl").exists())
    first.kill()
    first.wait()
    identity = subject.find_alive(tmp_path / "process.json")
    assert identity is not None
    seen: list[dict[str, Any]] = []
    with caplog.at_level(logging.INFO, "tasks.processes"):
        subject.supervise(job, seen.append)
    assert f"attached to pid {identity.pid}, which an earlier try left running" in caplog.messages
    steps = [record["step"] for record in seen]
    assert steps and steps == list(range(steps[0], 12))
    written = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == list(range(12))  # one trainer wrote them all


def test_job_with_another_command_is_stopped_and_started_anew(tmp_path: Path):
    old = subject.start_detached(SLEEP, ENV, tmp_path / "output.log", tmp_path / "process.json")
    seen: list[dict[str, Any]] = []
    subject.supervise(_job(tmp_path, STEPS.format(count=1, pause=0), grace_s=2), seen.append)
    assert not _runs(old.pid)
    assert seen == [{"step": 0}]


def test_stalled_job_is_stopped(tmp_path: Path):
    job = _job(tmp_path, "import time; print('begin', flush=True); time.sleep(60)", stall_timeout_s=0.6, grace_s=2)
    with pytest.raises(TimeoutError, match=r"pid \d+ gave no sign of life for 1 s: it hangs"):
        subject.supervise(job, print)
    pid = json.loads((tmp_path / "process.json").read_text())["pid"]
    assert not _runs(pid)


def test_sign_of_life_keeps_a_slow_job(tmp_path: Path):
    seen: list[dict[str, Any]] = []
    subject.supervise(_job(tmp_path, STEPS.format(count=6, pause=0.3), stall_timeout_s=1.2), seen.append)
    assert len(seen) == 6


def test_failing_listener_stops_the_job(tmp_path: Path):
    def refuse(record: dict[str, Any]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        subject.supervise(_job(tmp_path, STEPS.format(count=50, pause=0.5), grace_s=2), refuse)
    assert subject.find_alive(tmp_path / "process.json") is None


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


def test_last_lines(tmp_path: Path):
    (tmp_path / "log").write_bytes(b"".join(b"line %d\n" % number for number in range(50)) + b"\xff")
    assert subject.last_lines(tmp_path / "log", 2) == "line 49\n\ufffd"
    assert subject.last_lines(tmp_path / "none") == "(no output)"
