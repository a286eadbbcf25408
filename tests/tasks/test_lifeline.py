"""A trainer that beats and is told to stop: what its supervisor sees of a hang, and that its grace has an end."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tasks import processes
from tasks.supervision import Job, supervise
from tests.waiting import runs, wait_for

ROOT = Path(__file__).resolve().parents[2]
ENV = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
BEGIN = (
    "import os, signal, sys, time; from pathlib import Path\n"
    "from tasks.lifeline import Stopped, lifeline\n"
    "lifeline.start(Path(sys.argv[1]), float(sys.argv[2]))\n"
)
STEPS = BEGIN + (
    "lifeline.is_in_loop = True\n"
    "for step in range(1000):\n"
    "    lifeline.beat('train', step)\n"
    "    with (Path(sys.argv[1]) / 'metrics.jsonl').open('a') as out: out.write('{\"step\": %d}\\n' % step)\n"
    "    if lifeline.is_told: print('saved', step, flush=True); sys.exit(143)\n"
    "    time.sleep(0.05)\n"
)
DEAF = BEGIN + (
    "lifeline.beat('train', 3)\n"
    "while True:\n"
    "    try: time.sleep(60)\n"
    "    except BaseException: print('swallowed', flush=True)\n"
)


def job(folder: Path, code: str, grace_s: float = 5.0, **more: Any) -> Job:
    argv = [sys.executable, "-c", code, str(folder), str(grace_s)]
    return Job(argv=argv, env=ENV, folder=folder, **{"stall_timeout_s": 30.0, "grace_s": grace_s + 2, **more})


def run_alone(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-c", code, *arguments]
    return subprocess.run(argv, env=ENV, capture_output=True, text=True, check=False)


def beat(folder: Path) -> dict[str, Any]:
    path = folder / "heartbeat.json"
    return json.loads(path.read_text() or "{}") if path.exists() else {}


def test_told_in_the_loop_it_finishes_its_step_and_elsewhere_it_stops_at_once(tmp_path: Path):
    code = BEGIN + (
        "lifeline.is_in_loop = True\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "assert lifeline.is_told\n"
        "lifeline.is_in_loop = False\n"
        "try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(1)\n"
        "except Exception: sys.exit('a library may swallow it')\n"
        "except Stopped: print('stopped')\n"
    )
    done = run_alone(code, str(tmp_path), "5")
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr


def test_a_signal_is_not_forgotten_while_a_slow_disk_is_asked_for_the_file_that_asks_for_a_stop(tmp_path: Path):
    code = BEGIN + (
        "class Slow:\n"
        "    asked = False\n"
        "    def exists(self): self.asked = True; time.sleep(0.5); return False\n"
        "lifeline.is_in_loop, lifeline._asked = True, Slow()\n"
        "while not lifeline._asked.asked: time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(1)\n"
        "assert lifeline.is_told\n"
    )
    done = run_alone(code, str(tmp_path), "5")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_told_twice_it_still_writes_down_why_it_ends(tmp_path: Path):
    """A service manager tells the whole group, and our supervisor the trainer, at once."""
    code = (
        "import os, signal, sys, time; from pathlib import Path\n"
        "from tasks import files, training\n"
        "write = files.write_json\n"
        "def write_and_be_told(*args):\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1)\n"
        "    write(*args)\n"
        "files.write_json = write_and_be_told\n"
        "training.run_worker(Path(sys.argv[1]), lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5))\n"
    )
    done = run_alone(code, str(tmp_path))
    assert done.returncode == 143, done.stderr
    told = json.loads((tmp_path / "failure.json").read_text())
    assert told["error"] == "TransientError" and "told to stop (SIGTERM) in phase start" in told["message"]


def test_one_that_does_not_end_kills_itself_also_when_its_parent_is_gone(tmp_path: Path):
    """Prefect's worker kills the flow 30 s after a cancel: nobody is left then who would end a trainer that hangs."""
    process = subprocess.Popen([sys.executable, "-c", DEAF, str(tmp_path), "0.7"], env=ENV, stdout=subprocess.DEVNULL)
    wait_for(lambda: beat(tmp_path).get("step") == 3)
    began = time.monotonic()
    process.terminate()
    try:
        assert process.wait(10) == -signal.SIGKILL
        assert 0.6 < time.monotonic() - began < 5
    finally:
        process.kill()


def test_a_heartbeat_says_where_it_is_and_goes_on_on_a_full_disk(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", STEPS, str(tmp_path), "5"], env=ENV, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: beat(tmp_path).get("step", 0) > 0)
        first, blocks = beat(tmp_path), (tmp_path / "heartbeat.json").stat().st_blocks
        wait_for(lambda: beat(tmp_path)["step"] > first["step"])
        assert beat(tmp_path)["phase"] == "train" and beat(tmp_path)["count"] > first["count"]
        assert (tmp_path / "heartbeat.json").stat().st_blocks == blocks  # it asks the disk for nothing
    finally:
        process.kill()
        process.wait()


def test_main_thread_that_hangs_under_a_living_heartbeat_is_found_and_killed(tmp_path: Path):
    began = time.monotonic()
    with pytest.raises(
        TimeoutError, match=r"pid \d+: no progress for \d s: its heartbeat goes on, but in phase train of"
    ):
        supervise(job(tmp_path, DEAF, grace_s=0.5, stall_timeout_s=3.0), print)
    assert time.monotonic() - began < 20
    assert not runs(json.loads((tmp_path / "process.json").read_text())["pid"])
    assert "swallowed" in (tmp_path / "output.log").read_text()  # SIGTERM alone was not enough


def test_stopped_process_is_found_by_its_heartbeat(tmp_path: Path):
    def freeze(record: dict[str, Any]) -> None:
        if record["step"] == 40:
            os.kill(json.loads((tmp_path / "process.json").read_text())["pid"], signal.SIGSTOP)

    frozen = job(tmp_path, STEPS, grace_s=0.5, heartbeat_timeout_s=3.0)
    with pytest.raises(TimeoutError, match=r"its heartbeat stands still for \d s \(phase train, step \d+\)"):
        supervise(frozen, freeze)
    assert not runs(json.loads((tmp_path / "process.json").read_text())["pid"])


def test_a_slow_step_that_beats_is_left_alone(tmp_path: Path):
    code = BEGIN + "for count in range(30): lifeline.beat('train', 1); time.sleep(0.1)\n"
    supervise(job(tmp_path, code, stall_timeout_s=2.5, heartbeat_timeout_s=2.5), print)


class LeaseLostError(asyncio.CancelledError):
    """As Prefect raises it when the lease of a concurrency limit could not be renewed."""


def test_a_lost_lease_leaves_the_trainer_and_a_person_ends_it(tmp_path: Path):
    def lose(record: dict[str, Any]) -> None:
        raise LeaseLostError

    with pytest.raises(LeaseLostError):
        supervise(job(tmp_path, STEPS), lose)
    left = processes.find_alive(tmp_path / "process.json")
    assert left is not None

    def end(record: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise(job(tmp_path, STEPS), end)
    assert not runs(left.pid)
    assert "saved" in (tmp_path / "output.log").read_text()
