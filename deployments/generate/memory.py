"""Memory over the time of a generation: of the GPU where there is one, else of this process.

Ring: edge (/proc, torch).  Units: seconds, bytes.
"""

import resource
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

_EVERY_S = 0.02
_PAGE = resource.getpagesize()


class Memory:
    """Samples while it is entered; `records` are what tasks/pictures.py draws. With `keep=False` only the peak."""

    def __init__(self, *, on_gpu: bool, keep: bool) -> None:
        self.on_gpu, self._keep = on_gpu, keep
        self.records: list[dict[str, Any]] = []  # Any: numbers
        self._done = threading.Event()
        self._start = time.monotonic()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        if self._keep:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        if self._keep:
            self._thread.join()
            self._look()

    @property
    def peak_bytes(self) -> int:
        """Most that was held since it was entered (of the host: since the process began)."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def total_bytes(self) -> int:
        """Of the card; 0 without one."""
        return torch.cuda.get_device_properties(0).total_memory if self.on_gpu else 0

    def _sample(self) -> None:
        while not self._done.is_set():
            self._look()
            self._done.wait(_EVERY_S)

    def _look(self) -> None:
        key = "gpu_bytes" if self.on_gpu else "host_bytes"
        held = torch.cuda.memory_allocated() if self.on_gpu else _resident_bytes()
        self.records.append({"time_s": time.monotonic() - self._start, key: held})


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
