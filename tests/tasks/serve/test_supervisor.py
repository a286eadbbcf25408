"""A service that dies is started again, with pauses, and not for ever; its log stays small and whole."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.serve import supervisor as subject
from tasks.serve.supervisor import RotatingLog
from tests.waiting import runs, wait_for


@pytest.fixture
def start(tmp_path: Path):
    """Start a supervisor on a Python program; the constants may be others than production's."""
    started: list[subprocess.Popen[bytes]] = []

    def run(program: str, **constants: float) -> subprocess.Popen[bytes]:
        begin = f"import sys; sys.path.insert(0, {str(Path(subject.__file__).parent)!r}); import supervisor as s; "
        begin += "".join(f"s.{name} = {value}; " for name, value in constants.items())
        words = [str(tmp_path / "state"), str(tmp_path / "log"), "--", sys.executable, "-c", program]
        process = subprocess.Popen([sys.executable, "-c", f"{begin} sys.exit(s.main({words!r}) & 255)"])
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def _state(tmp_path: Path) -> dict:
    try:
        return json.loads((tmp_path / "state").read_text())
    except OSError:
        return {}


def _child(tmp_path: Path, other_than: int = 0) -> int:
    wait_for(lambda: _state(tmp_path).get("child", 0) not in (0, other_than), 20)
    return _state(tmp_path)["child"]


SLEEPS = "import time; print('up', flush=True); time.sleep(600)"


def test_what_dies_before_it_was_ready_is_not_tried_again(start, tmp_path: Path):
    assert start("import sys; print('no such model'); sys.exit(7)").wait(20) == 7
    assert (tmp_path / "log").read_text() == "no such model\n"


def test_what_was_ready_is_started_again_after_a_kill(start, tmp_path: Path):
    process = start(SLEEPS, FIRST_PAUSE_S=0.1)
    first = _child(tmp_path)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    os.kill(first, signal.SIGKILL)
    second = _child(tmp_path, other_than=first)
    assert runs(second) and _state(tmp_path)["restarts"] == 1
    assert "supervisor: it ended with code -9: started again in 0.1 s\n" in (tmp_path / "log").read_text()


def test_quick_deaths_in_a_row_end_the_trying_and_are_told(start, tmp_path: Path):
    process = start("import time; time.sleep(0.4)", FIRST_PAUSE_S=0.05, MAX_QUICK_DEATHS=3)
    _child(tmp_path)
    process.send_signal(signal.SIGUSR1)
    process.wait(30)
    state = _state(tmp_path)
    assert (state["state"], state["restarts"]) == ("gave up", 2)
    assert state["why"] == "it ended 3 times within 60 s, last with code 0"


def test_sigterm_ends_the_service_in_order(start, tmp_path: Path):
    told = "import signal, sys, time; signal.signal(15, lambda *_: (print('bye', flush=True), sys.exit(3))); "
    process = start(told + SLEEPS)
    child = _child(tmp_path)
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: "up\n" in (tmp_path / "log").read_text())  # else the signal may come between word and line end
    process.terminate()
    assert process.wait(20) == 0
    assert not runs(child) and (tmp_path / "log").read_text() == "up\nbye\n"


def test_a_signal_that_another_thread_gets_is_obeyed(start, tmp_path: Path):
    """The kernel gives SIGTERM to any thread when one for the first is on its way."""
    process = start(SLEEPS)
    child = _child(tmp_path)
    (other,) = {int(each.name) for each in Path(f"/proc/{process.pid}/task").iterdir()} - {process.pid}
    ctypes.CDLL(None).tgkill(process.pid, other, signal.SIGTERM)
    assert process.wait(20) == 0 and not runs(child)


def test_a_killed_supervisor_takes_the_service_with_it(start, tmp_path: Path):
    process = start(SLEEPS)
    child = _child(tmp_path)
    process.kill()
    process.wait()
    wait_for(lambda: not runs(child))


def test_no_line_is_lost_and_the_logs_stay_small(tmp_path: Path):
    log = RotatingLog(tmp_path / "log", log_bytes=1000, num_logs=100)
    lines = [f"line {number:05} {'x' * (number % 90)}\n" for number in range(800)]
    text = "".join(lines).encode()
    for start in range(0, len(text), 777):  # pieces that end anywhere, as a pipe gives them
        log.write(text[start : start + 777])
    numbers = sorted(int(path.suffix[1:]) for path in tmp_path.glob("log.*"))
    parts = [*(tmp_path / f"log.{number}" for number in reversed(numbers)), tmp_path / "log"]
    assert b"".join(part.read_bytes() for part in parts) == text
    assert all(part.read_bytes().endswith(b"\n") and part.stat().st_size < 1100 for part in parts[:-1])


def test_the_oldest_log_goes_when_there_are_enough(tmp_path: Path):
    log = RotatingLog(tmp_path / "log", log_bytes=100, num_logs=3)
    for number in range(100):
        log.write(f"{number:09}\n".encode())
    assert sorted(path.name for path in tmp_path.glob("log*")) == ["log", "log.1", "log.2"]
    assert "000000099" in (tmp_path / "log").read_text() + (tmp_path / "log.1").read_text()


LEAVES = """
import os, signal, subprocess, sys, time
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(602)"
for words in (["sleep", "601"], [sys.executable, "-c", deaf]):
    child = subprocess.Popen(words, start_new_session=True)
    with open({left!r}, "a") as handle:
        handle.write(f"{{child.pid}}\\n")
time.sleep(600)
"""


def test_what_a_killed_service_leaves_is_gone_before_the_next_start(start, tmp_path: Path):
    """vLLM's engine outlives its server that the kernel killed for memory, and keeps the GPU's."""
    left = tmp_path / "left"
    process = start(LEAVES.format(left=str(left)), FIRST_PAUSE_S=0.1, LEFTOVERS_S=1.0)
    first = _child(tmp_path)
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: left.exists() and len(left.read_text().split()) == 2 and "deaf" in (tmp_path / "log").read_text())
    orphans = [int(pid) for pid in left.read_text().split()]
    os.kill(first, signal.SIGKILL)
    try:
        _child(tmp_path, other_than=first)
        assert [pid for pid in orphans if runs(pid)] == []
        wait_for(lambda: len(left.read_text().split()) == 4)
        orphans = [int(pid) for pid in left.read_text().split()]
        process.terminate()
        assert process.wait(20) == 0
        assert [pid for pid in orphans if runs(pid)] == []
    finally:
        for pid in filter(runs, orphans):
            os.kill(pid, signal.SIGKILL)
