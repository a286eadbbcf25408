"""The trainer's side of being watched and being told to stop: a heartbeat, and a SIGTERM that is obeyed in time.

    start() -> thread: heartbeat.json once a second  (which step, which phase, since when)
    SIGTERM -> in the loop: `is_told` is looked at after each step; elsewhere: Stopped at once
            -> after the grace SIGKILL to itself, also when the main thread hangs or its parent is gone

The thread learns of a signal from Python's wake-up descriptor, which is written by the C handler: no hung main thread
can keep it from that.

Ring: edge; runs inside a trainer process, once per process as signals are (no Prefect, no torch).  Units: seconds.
"""

import contextlib
import json
import os
import select
import signal
import threading
import time
from pathlib import Path

HEARTBEAT = "heartbeat.json"
_INTERVAL_S = 1.0
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
        self._grace_s = 25.0

    def start(self, folder: Path, grace_s: float, *, writes: bool) -> None:
        """Begin to beat (when `writes`: one rank does) and to obey SIGTERM. Only the main thread may call it."""
        self._grace_s = grace_s
        self._state["pid"] = os.getpid()
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.signal(signal.SIGTERM, self._obey)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        target = os.open(folder / HEARTBEAT, os.O_RDWR | os.O_CREAT, 0o600) if writes else None
        threading.Thread(target=self._run, args=(read, target), name="heartbeat", daemon=True).start()

    def beat(self, phase: str, step: int) -> None:
        """Say what the process does now; each call is progress."""
        count = self._state["count"]
        assert isinstance(count, int)
        self._state = {**self._state, "phase": phase, "step": step, "count": count + 1}

    @property
    def phase(self) -> str:
        """What it does now."""
        return str(self._state["phase"])

    def _obey(self, number: int, frame: object) -> None:
        self.is_told = True
        if not self.is_in_loop and not self._is_stopping:
            self._is_stopping = True  # a second signal must not cut off the last words after the first
            raise Stopped

    def _run(self, signals: int, target: int | None) -> None:
        while True:
            if target is not None:
                with contextlib.suppress(OSError):
                    os.pwrite(target, (json.dumps(self._state | {"time": time.time()})).ljust(_BYTES).encode(), 0)
            ready, _, _ = select.select([signals], [], [], _INTERVAL_S)
            if ready and signal.SIGTERM in os.read(signals, 64) and self._told_at is None:
                self._told_at = time.monotonic()
            if self._told_at is not None and time.monotonic() - self._told_at > self._grace_s:
                os.kill(os.getpid(), signal.SIGKILL)


lifeline = Lifeline()
