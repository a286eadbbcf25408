"""Children outlive a killed parent, are found again, are never confused, and end with all they started."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks import processes as subject
from tasks import procfs
from tasks.errors import ServiceError, TransientError
from tasks.processes import Identity, Program
from tests.waiting import runs, wait_for

ROOT = Path(__file__).resolve().parents[2]
ENV = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def _program(folder: Path, argv: list[str], env: dict[str, str] = ENV) -> Program:
    return Program(
        argv=tuple(argv), variables=env, identity_file=folder / "id.json", log=folder / "log", digest="what it runs"
    )


@pytest.fixture(autouse=True)
def _ended(tmp_path: Path) -> Iterator[None]:
    yield
    subject.stop(tmp_path / "id.json", grace_s=0)


def test_started_process_is_recognised_and_its_output_kept(tmp_path: Path):
    argv = [sys.executable, "-c", "import os; print(os.getsid(0) == os.getpid(), os.environ['WORD'], flush=True)"]
    identity = subject.start_detached(_program(tmp_path, argv, {**ENV, "WORD": "祭り"}))
    wait_for(lambda: subject.find_alive(tmp_path / "id.json") is None)
    assert (tmp_path / "log").read_text() == "True 祭り\n"
    assert not identity.is_alive()
    identity = subject.start_detached(_program(tmp_path, SLEEP))
    assert subject.find_alive(tmp_path / "id.json") == identity
    assert identity.digest == "what it runs" and identity.host and identity.boot_id
    assert subject.stop(tmp_path / "id.json", grace_s=5)
    assert subject.find_alive(tmp_path / "id.json") is None
    assert not subject.stop(tmp_path / "id.json")


def test_secrets_of_a_program_are_not_shown_or_written(tmp_path: Path):
    program = _program(tmp_path, SLEEP, {**ENV, "HF_TOKEN": "hf_secret"})
    subject.start_detached(program)
    assert "hf_secret" not in repr(program) + (tmp_path / "id.json").read_text()


def test_program_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ServiceError, match="id did not start: /no/such: No such file"):
        subject.start_detached(_program(tmp_path, ["/no/such"]))
    subject.start_detached(_program(tmp_path, SLEEP))  # the failed start keeps no lock


def test_missing_torn_or_older_identity_names_nobody(tmp_path: Path):
    assert subject.find_alive(tmp_path / "none.json") is None
    for text in ("", '{"pid": 1', "[]", '{"pid": 1}', "null", '{"pid": 1, "started": 1, "argv": "x"}'):
        (tmp_path / "id.json").write_text(text)
        assert subject.find_alive(tmp_path / "id.json") is None


def test_recycled_pid_another_boot_or_another_host_is_neither_trusted_nor_killed(tmp_path: Path):
    stranger = subprocess.Popen(SLEEP)
    try:
        started = procfs.read_start_ticks(stranger.pid)
        assert started is not None
        here = {"pid": stranger.pid, "started": started, "boot_id": procfs.read_boot_id(), "host": socket.gethostname()}
        assert Identity(**here).is_alive()
        for change in ({"started": started - 1}, {"boot_id": "another boot"}, {"host": "another-host"}):
            (tmp_path / "id.json").write_text(json.dumps({**here, **change}))
            assert not Identity(**{**here, **change}).is_alive()
            assert subject.find_alive(tmp_path / "id.json") is None
            assert not subject.stop(tmp_path / "id.json", grace_s=0.1)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


PARENT = """
import os, signal, sys, time
from pathlib import Path
from tasks import files, processes
here, dies = Path(sys.argv[1]), sys.argv[2]
argv = (sys.executable, '-c', 'import time; time.sleep(60)')
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if dies == 'before the identity is written':
    files.write_json = die
processes.start_detached(processes.Program(argv=argv, variables=dict(os.environ), identity_file=here / 'id.json',
                                           log=here / 'log', digest='what it runs'))
die()
"""


@pytest.mark.parametrize("dies", ["before the identity is written", "later"])
def test_child_of_a_killed_parent_is_found_and_not_started_twice(tmp_path: Path, dies: str, monkeypatch):
    monkeypatch.setattr(subject, "_LOCK_WAIT_S", 0.5)
    command = [sys.executable, "-c", PARENT, str(tmp_path), dies]
    assert subprocess.run(command, env=ENV, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "id.json").exists() is (dies == "later")
    found = subject.find_alive(tmp_path / "id.json")
    assert found is not None and runs(found.pid) and found.digest == "what it runs"
    with pytest.raises(TransientError, match=r"id of .* is run by .*: wait until it ends, or end it there"):
        subject.start_detached(_program(tmp_path, SLEEP))
    assert subject.stop(tmp_path / "id.json", grace_s=5)
    assert not runs(found.pid)


def test_start_between_fork_and_exec_is_waited_for(tmp_path: Path):
    """The lock is taken before the fork: who looks in between finds no process yet, but does not start a second."""
    lock = subject._take_lock(tmp_path / "id.json")
    found: list[Identity | None] = []
    looker = threading.Thread(target=lambda: found.append(subject.find_alive(tmp_path / "id.json")))
    looker.start()
    time.sleep(0.3)
    assert found == []
    os.close(lock)
    started = subject.start_detached(_program(tmp_path, SLEEP))
    looker.join()
    assert found in ([started], [None])  # None: it looked in the moment when nobody held the lock


def test_process_on_another_host_that_shares_the_folder_is_not_doubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = {"pid": 17, "started": 5, "boot_id": "another boot", "host": "gpu-7"}
    (tmp_path / "id.json").write_text(json.dumps(other))
    monkeypatch.setattr(subject, "_LOCK_WAIT_S", 0.2)
    lock = subject._take_lock(tmp_path / "id.json")  # as the kernel of gpu-7 holds it
    try:
        assert subject.find_alive(tmp_path / "id.json") is None
        with pytest.raises(TransientError, match="is run by pid 17 on host gpu-7"):
            subject.start_detached(_program(tmp_path, SLEEP))
    finally:
        os.close(lock)
    assert subject.start_detached(_program(tmp_path, SLEEP)).host == socket.gethostname()  # gpu-7 is done


@pytest.mark.parametrize("trap", ["", "trap '' TERM; "])
def test_stop_ends_grandchildren_too(tmp_path: Path, trap: str):
    """With a trap, SIGTERM is ignored by all of them and SIGKILL has to do it."""
    pids = tmp_path / "pids"
    argv = ["bash", "-c", f"{trap}sleep 60 & echo $! >> {pids}; (sleep 60 & echo $! >> {pids}; wait) & wait; sleep 60"]
    identity = subject.start_detached(_program(tmp_path, argv))
    wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    grandchildren = [int(pid) for pid in pids.read_text().split()]
    assert all(map(runs, grandchildren))
    subject.stop(tmp_path / "id.json", grace_s=0.4)
    assert not any(map(runs, [identity.pid, *grandchildren]))


def test_orphans_of_a_dead_leader_are_ended(tmp_path: Path):
    pids = tmp_path / "pids"
    argv = ["bash", "-c", f"sleep 60 & echo $! > {pids}"]
    subject.start_detached(_program(tmp_path, argv))
    wait_for(lambda: subject.find_alive(tmp_path / "id.json") is None)
    orphan = int(pids.read_text())
    assert runs(orphan)
    assert subject.stop(tmp_path / "id.json", grace_s=5)
    assert not runs(orphan)


def test_child_that_survives_its_leader_is_not_taken_for_it(tmp_path: Path):
    """A rank in a session of its own, as torchrun starts them: it is stopped, never followed."""
    rank = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)"
    leader = subject.start_detached(_program(tmp_path, [sys.executable, "-c", rank]))
    wait_for(lambda: not leader.is_alive())
    (tmp_path / "id.json").unlink()
    assert subject.find_alive(tmp_path / "id.json") is None
    assert len(subject.find_members(tmp_path / "id.json", None)) == 1
    assert subject.stop(tmp_path / "id.json", grace_s=5)
    assert subject.find_members(tmp_path / "id.json", None) == {}


def test_last_lines(tmp_path: Path):
    (tmp_path / "log").write_bytes(b"".join(b"line %d\n" % number for number in range(50)) + b"\xff")
    assert subject.last_lines(tmp_path / "log", 2) == "line 49\n\ufffd"
    assert subject.last_lines(tmp_path / "none") == "(no output)"
