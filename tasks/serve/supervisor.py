"""Keep one service running: started again when it dies, its output in logs of limited size.

    python -I -S supervisor.py STATE LOG -- COMMAND...

SIGUSR1 says that the service was ready once. Before it a death is the start's failure: the supervisor ends with
it. After it the service is started again after 1, 2, 4 ... 60 s; five deaths in a row that came within a minute
of their start end the trying, and the state file says so. SIGTERM goes on to the service and ends both; a
supervisor that is killed takes the service with it (the kernel tells it), so nothing runs unwatched. What a service
that died leaves behind (vLLM's engine, when only its server was killed) holds the GPU's memory, and the next start
would not get it: it is ended first.

It is run by its path and needs the standard library only: 15 ms and 9 MB, whatever the service's environment.

Ring: edge.  Units: seconds, bytes.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

QUICK_S, MAX_QUICK_DEATHS = 60.0, 5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
LOG_BYTES, NUM_LOGS = 20_000_000, 5
LEFTOVERS_S = 5.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None)


def _end_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _children() -> list[int]:
    """Return the processes whose parent is this one: once the service is dead, whatever it left."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it ended
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(entry.name))
    return found


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def end_leftovers() -> None:
    """End what the dead service left, and what that leaves in turn: SIGTERM, after LEFTOVERS_S SIGKILL."""
    told, deadline = set[int](), time.monotonic() + LEFTOVERS_S
    while True:
        _reap()
        left = _children()
        if not left:
            return
        is_late = time.monotonic() > deadline
        for pid in left if is_late else set(left) - told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if is_late else signal.SIGTERM)
        told |= set(left)
        if time.monotonic() > deadline + LEFTOVERS_S:  # stuck in the kernel: no signal helps
            return
        time.sleep(0.05)


class RotatingLog:
    """Takes bytes; a file that is full is renamed to `.1` at the end of a line, the older ones move on."""

    def __init__(self, path: Path, log_bytes: int = LOG_BYTES, num_logs: int = NUM_LOGS) -> None:
        self._path, self._limit, self._count = path, log_bytes, num_logs
        self._handle: BinaryIO = path.open("ab", buffering=0)
        self._lock = threading.Lock()

    def write(self, data: bytes) -> None:
        """Append; what a full disk does not take is lost, the service goes on."""
        with self._lock, contextlib.suppress(OSError):
            room = self._limit - self._handle.tell()
            cut = data.find(b"\n", max(0, room - 1)) + 1 if len(data) >= room else 0
            if not cut:
                self._put(data)
                return
            self._put(data[:cut])
            self._rotate()
            self._put(data[cut:])

    def _put(self, data: bytes) -> None:
        while data:
            data = data[self._handle.write(data) or 0 :]

    def _rotate(self) -> None:
        self._handle.close()
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{n}") for n in range(1, self._count))]
        for older, newer in zip(reversed(names), list(reversed(names))[1:], strict=False):
            with contextlib.suppress(FileNotFoundError):
                newer.replace(older)
        self._handle = self._path.open("ab", buffering=0)


def _wait(child: "subprocess.Popen[bytes]") -> int:
    """Return the child's code, looking up once a second.

    Not `child.wait()`: a signal that the kernel gives to the other thread, or that comes just before the system call,
    does not interrupt it, and Python would run our handler when the service has ended by itself.
    """
    handle = os.pidfd_open(child.pid)
    try:
        while child.poll() is None:
            select.select([handle], [], [], 1.0)
    finally:
        os.close(handle)
    return child.returncode


class Supervisor:
    """One service and what became of it."""

    def __init__(self, state: Path, log: Path, command: list[str]) -> None:
        self._state, self._command, self._log = state, command, RotatingLog(log)
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping, self._kept = threading.Event(), False
        self._read_end, self._write_end = os.pipe()
        self._pump = threading.Thread(target=self._pump_forever, daemon=True)

    def run(self) -> int:
        """Return when the service was stopped, died before it was ready, or died too often."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop())
        signal.signal(signal.SIGUSR1, lambda *_: self._keep())
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what the service leaves comes to us, not to init
        self._pump.start()
        code, restarts, quick = 0, 0, 0
        while not self._stopping.is_set():
            began = time.monotonic()
            code = self._run_once(restarts)
            end_leftovers()
            if self._stopping.is_set():
                code = 0
            elif not self._kept:
                break
            else:
                quick = quick + 1 if time.monotonic() - began < QUICK_S else 1
                if quick >= MAX_QUICK_DEATHS:
                    self._say(
                        "gave up", restarts, f"it ended {quick} times within {QUICK_S:g} s, last with code {code}"
                    )
                    break
                pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (quick - 1))
                restarts += 1
                self._say("waiting", restarts, f"it ended with code {code}: started again in {pause_s:g} s")
                self._stopping.wait(pause_s)
        os.close(self._write_end)
        self._pump.join(5.0)  # a grandchild may hold the other end open
        return code

    def _run_once(self, restarts: int) -> int:
        self._child = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._write_end,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent,
        )
        if self._stopping.is_set():
            self._child.terminate()
        self._write(state="running", child=self._child.pid, restarts=restarts, why="")
        return _wait(self._child)

    def _stop(self) -> None:
        self._stopping.set()
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()

    def _keep(self) -> None:
        self._kept = True

    def _say(self, state: str, restarts: int, why: str) -> None:
        self._log.write(f"supervisor: {why}\n".encode())
        self._write(state=state, child=0, restarts=restarts, why=why)

    def _write(self, **state: str | int) -> None:
        aside = self._state.with_name(f".{self._state.name}.tmp")
        with contextlib.suppress(OSError):  # a full disk: the service is worth more than what is said of it
            aside.write_text(json.dumps(state))
            aside.replace(self._state)

    def _pump_forever(self) -> None:
        while data := os.read(self._read_end, 1 << 16):
            self._log.write(data)


def main(words: list[str]) -> int:
    """Run the command after `--`."""
    cut = words.index("--")
    state, log = words[:cut]
    return Supervisor(Path(state), Path(log), words[cut + 1 :]).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) & 0xFF)
