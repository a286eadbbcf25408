"""The trainer's side of being watched and being told to stop: a heartbeat, and a SIGTERM that is obeyed in time.

    start() -> thread: heartbeat.json once a second  (which step, which phase, since when); heartbeats/N.json of rank N
    SIGTERM -> in the loop: `is_told` is looked at after each step; elsewhere: Stopped at once
            -> after the grace SIGKILL to itself, also when the main thread hangs or its parent is gone
    stop.asked in the folder -> the same after a step, without hurry: who wrote it knows how long there is

The thread learns of a signal from Python's wake-up descriptor, which is written by the C handler: no hung main thread
can keep it from that.

Ring: edge; runs inside a trainer process, once per process as signals are (no Prefect, no torch).  Units: seconds.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

from tasks.launch_script import STOP_ASKED

HEARTBEAT = "heartbeat.json"  # of rank 0, by which a run is judged
_OTHERS = "heartbeats"  # of the other ranks: looked at when it hangs
_INTERVAL_S, _OTHERS_INTERVAL_S = 1.0, 5.0
_BYTES = 512  # always the same blocks: a full disk must not look like a hang


class Stopped(BaseException):
    """The process was told to stop. No Exception: no library may swallow it."""


class Lifeline:
    """What this process does now, and whether it was told to stop."""

    def __init__(self) -> None:
        self.is_told = False
        self.is_in_loop = False  # a step, its checkpoint included, is finished before the process stops
        self._state: dict[str, object] = {"pid": os.getpid(), "phase": "start", "step": 0, "count": 0}
        self._is_stopping = False
        self._told_at: float | None = None
        self._grace_s, self._interval_s = 25.0, _INTERVAL_S
        self._asked = Path(STOP_ASKED)
        self._target: int | None = None

    def start(self, folder: Path, grace_s: float, *, rank: int = 0) -> None:
        """Begin to beat and to obey SIGTERM. Only the main thread may call it."""
        self._grace_s, self._interval_s = grace_s, _OTHERS_INTERVAL_S if rank else _INTERVAL_S
        self._asked = folder / STOP_ASKED
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._state = self._state | {"pid": os.getpid(), "rank": rank, "host": host}
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.signal(signal.SIGTERM, self._obey)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        path = folder / HEARTBEAT if rank == 0 else folder / _OTHERS / f"{rank}.json"
        path.parent.mkdir(exist_ok=True)
        self._target = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        threading.Thread(target=self._run, args=(read,), name="heartbeat", daemon=True).start()

    def beat(self, phase: str, step: int) -> None:
        """Say what the process does now; each call is progress."""
        count = self._state["count"]
        assert isinstance(count, int)
        self._state = {**self._state, "phase": phase, "step": step, "count": count + 1}

    def mark(self, phase: str) -> None:
        """Beat within the same step, written before what comes next: that may end the process without a word."""
        step = self._state["step"]
        assert isinstance(step, int)
        self.beat(phase, step)
        self._write()

    @property
    def phase(self) -> str:
        """What it does now."""
        return str(self._state["phase"])

    def _obey(self, number: int, frame: object) -> None:
        self.is_told = True
        if not self.is_in_loop and not self._is_stopping:
            self._is_stopping = True  # a second signal must not cut off the last words after the first
            raise Stopped

    def _write(self) -> None:
        if self._target is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._target, (json.dumps(self._state | {"time": time.time()})).ljust(_BYTES).encode(), 0)

    def _run(self, signals: int) -> None:
        while True:
            self._write()
            ready, _, _ = select.select([signals], [], [], self._interval_s if self._told_at is None else _INTERVAL_S)
            if ready and signal.SIGTERM in os.read(signals, 64) and self._told_at is None:
                self._told_at = time.monotonic()
            if self._asked.exists():  # no |=: it would write back what it read before a signal came
                self.is_told = True
            if self._told_at is not None and time.monotonic() - self._told_at > self._grace_s:
                os.kill(os.getpid(), signal.SIGKILL)


def read_beats(folder: Path) -> list[dict[str, Any]]:  # Any: JSON values
    """Return the last heartbeat of each rank that has begun."""
    found: list[dict[str, Any]] = []
    for path in (folder / HEARTBEAT, *(folder / _OTHERS).glob("*.json")):
        with contextlib.suppress(OSError, ValueError):  # not begun, or half written
            found.append(json.loads(path.read_text()))
    return found


def forget_beats(folder: Path) -> None:
    """Remove the heartbeats of an earlier run, which would seem to stand still, and what it was asked."""
    (folder / HEARTBEAT).unlink(missing_ok=True)
    (folder / STOP_ASKED).unlink(missing_ok=True)
    shutil.rmtree(folder / _OTHERS, ignore_errors=True)


lifeline = Lifeline()
