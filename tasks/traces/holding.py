"""Append to the queue, or hold lines in memory while the disk takes no writes.

    HoldingWriter.append(lines) -> SegmentWriter, one write
                               -> disk full: held, in order -> appended as soon as a write succeeds

A full disk costs nothing until the hold is full as well; then the newest line is lost and counted.
What is held is lost by a SIGKILL. Nothing here raises for the disk's sake: a trace never fails an answer.

Ring: edge (disk).  Units: bytes, seconds.
"""

import logging
import time
from collections import deque
from collections.abc import Sequence

from tasks.traces.segments import SegmentWriter

_FLUSH_BYTES = 256 << 10  # one write while catching up: it happens on the gateway's event loop
_RETRY_S = 0.05
_SAY_S = 10.0
logger = logging.getLogger(__name__)


class HoldingWriter:
    """Appends lines in order, one thread. Counts what was written, is held, and was lost."""

    def __init__(self, writer: SegmentWriter, max_lines: int, max_bytes: int) -> None:
        self.num_written = 0
        self.num_lost = 0
        self.held_bytes = 0
        self._writer = writer
        self._held: deque[bytes] = deque()
        self._max_lines, self._max_bytes = max_lines, max_bytes
        self._try_at = self._say_at = 0.0

    @property
    def num_held(self) -> int:
        """Lines in memory that the disk has not taken yet."""
        return len(self._held)

    def append(self, *lines: bytes) -> None:
        """Write the lines, all in one write, after all that is held; hold them when that can't be."""
        if (self._held and not self.flush()) or not self._write(lines):
            for line in lines:
                self._hold(line)

    def flush(self) -> bool:
        """Try to write some of what is held; True when nothing is held any more."""
        if not self._held:
            return True
        if time.monotonic() < self._try_at:
            return False
        batch, size = [], 0
        for line in self._held:
            if batch and size + len(line) > _FLUSH_BYTES:
                break
            batch.append(line)
            size += len(line)
        if not self._write(batch):
            return False
        for line in batch:
            self._held.popleft()
            self.held_bytes -= len(line)
        if not self._held:
            logger.warning("%s takes writes again: all held traces are written", self._writer.path)
        return not self._held

    def give_up(self) -> None:
        """Count what is still held as lost: the process ends."""
        num_held, self._try_at = 0, 0.0
        while self._held and len(self._held) != num_held:  # a flush writes some of it
            num_held = len(self._held)
            self.flush()
        if self._held:
            self.num_lost += len(self._held)
            logger.error("lost %d traces that %s never took", len(self._held), self._writer.path)
            self._held.clear()
            self.held_bytes = 0

    def _write(self, lines: Sequence[bytes]) -> bool:
        try:
            self._writer.append(lines)
        except OSError as error:
            now = time.monotonic()
            self._try_at = now + _RETRY_S
            if now >= self._say_at:
                self._say_at = now + _SAY_S
                logger.error(
                    "%s takes no writes (%s): %d traces wait in memory, %d are lost; free some space there",
                    *(self._writer.path, error.strerror or error, len(self._held), self.num_lost),
                )
            return False
        self.num_written += len(lines)
        return True

    def _hold(self, line: bytes) -> None:
        if len(self._held) >= self._max_lines or self.held_bytes + len(line) > self._max_bytes:
            self.num_lost += 1
            return
        self._held.append(line)
        self.held_bytes += len(line)
