"""Write one shard in order and hash it beside: pieces from memory, and whole ranges of the base's files.

    maker threads: read, add, round  ->  caller: output.py  ->  hasher thread: sha256, finite?

Through the page cache ranges never come into the process as tensors: the kernel copies them (or only links the extents,
where the file system shares them), and the hasher reads them back a moment later.

Ring: edge (disk, threads).  Units: bytes.
"""

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from typing import Self

import torch

from tasks.errors import CorruptError
from tasks.merge.output import CachedFile, DirectFile
from tasks.merge.reader import DTYPES, Buffers, bytes_of, is_finite
from tasks.merge.stream import Piece, Range

_PIECE_BYTES, _COPY_BYTES = 1 << 20, 64 << 20
_AT_LEAST, _AHEAD_BYTES = 1, 12 << 20  # pieces that are made before they are written
_WAITING = 3  # pieces between the writer and the hasher


class ShardWriter:
    """One file being written from its first byte to its last, and its sha256."""

    def __init__(self, output: CachedFile | DirectFile, name_at: Callable[[int], str], buffers: Buffers) -> None:
        self._output = output
        self._buffers = buffers  # of the pieces: they are given back when they are hashed
        self._name_at = name_at  # the tensor at a byte of the file, for errors
        self._size = 0
        self._hash = sha256()
        self._todo: queue.Queue[tuple[torch.Tensor | int, int, str] | None] = queue.Queue(_WAITING)
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="merge-hash", daemon=True)

    @classmethod
    @contextmanager
    def opened(cls, output: CachedFile | DirectFile, name_at: Callable[[int], str], buffers: Buffers) -> Iterator[Self]:
        """Hash in a thread while the body writes; the thread is gone afterwards."""
        writer = cls(output, name_at, buffers)
        writer._thread.start()
        try:
            yield writer
        finally:
            writer._todo.put(None)
            writer._thread.join()

    def write(self, data: torch.Tensor, dtype: str = "") -> None:
        """Append a tensor's bytes; of a `dtype` that is named they must be finite."""
        view = bytes_of(data)
        self._output.write(view)
        self._hand_on(data, len(view), dtype)

    def copy(self, source: int, first: int, size: int, dtype: str) -> None:
        """Append a range of another file; its tensors are of type `dtype`, and must be finite."""
        output = self._output
        step = _COPY_BYTES if isinstance(output, CachedFile) else _PIECE_BYTES
        for begin in range(first, first + size, step):
            count = min(step, first + size - begin)
            if isinstance(output, CachedFile):
                output.copy(source, begin, count)
                self._hand_on(count, count, dtype)
            else:
                piece = self._buffers.take(count, torch.uint8)
                _read(source, bytes_of(piece), begin)
                self.write(piece, dtype)

    def digest(self) -> str:
        """Return the sha256 of all that was written. Raises: what the hasher met, a value that is not finite."""
        self._output.finish()
        self._todo.put(None)
        self._thread.join()
        if self._failed:
            raise self._failed
        return self._hash.hexdigest()

    def _hand_on(self, item: torch.Tensor | int, size: int, dtype: str) -> None:
        if self._failed:
            raise self._failed
        self._todo.put((item, self._size, dtype))
        self._size += size

    def _run(self) -> None:
        while (task := self._todo.get()) is not None:
            item, position, dtype = task
            try:
                if self._failed is None:
                    self._take(item, position, dtype)
            except BaseException as error:  # noqa: BLE001  # raised in the caller's thread, by its next call
                self._failed = error
            del task, item

    def _take(self, item: torch.Tensor | int, position: int, dtype: str) -> None:
        """Hash a piece, or so many bytes of the file."""
        if isinstance(item, torch.Tensor):
            self._check(bytes_of(item), position, dtype)
            self._buffers.give(item)
            return
        buffer = bytearray(_PIECE_BYTES)
        for at in range(position, position + item, _PIECE_BYTES):
            view = memoryview(buffer)[: min(_PIECE_BYTES, position + item - at)]
            _read(self._output.handle, view, at)
            self._check(view, at, dtype)

    def _check(self, view: memoryview, position: int, dtype: str) -> None:
        self._hash.update(view)
        if dtype not in DTYPES:
            return
        values = torch.frombuffer(view, dtype=DTYPES[dtype])
        if not is_finite(values):
            bad = position + int((~torch.isfinite(values)).nonzero()[0]) * values.itemsize
            raise CorruptError(f"base tensor {self._name_at(bad)} holds a value that is not finite: download it again")


def _read(handle: int, view: memoryview, position: int) -> None:
    """Fill `view` from a file. Raises: CorruptError when it ends before."""
    done = 0
    while done < len(view):
        got = os.preadv(handle, [view[done:]], position + done)
        if got == 0:
            raise CorruptError(f"a file of the merge ends before byte {position + len(view)}: download the base again")
        done += got


@contextmanager
def makers(count: int) -> Iterator[Executor]:
    """Threads that make pieces, each with one thread of torch: several that wait for each other cost more."""
    pool = ThreadPoolExecutor(count, thread_name_prefix="merge-make", initializer=partial(torch.set_num_threads, 1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(parts: Iterable[Range | Piece], pool: Executor) -> Iterator[Range | torch.Tensor]:
    """Yield the parts one after the other; pieces are made in the pool, as many ahead as a few megabytes allow.

    Raises what making a piece raised, at its place.
    """
    waiting: deque[tuple[Range | Future[torch.Tensor], int]] = deque()

    def take() -> Range | torch.Tensor:
        part = waiting.popleft()[0]
        return part if isinstance(part, Range) else part.result()

    try:
        for part in parts:
            if isinstance(part, Piece) and part.is_last:
                while waiting:
                    yield take()
            if isinstance(part, Range):
                waiting.append((part, 0))
            else:
                waiting.append((pool.submit(part.make), part.num_bytes))
            while len(waiting) > _AT_LEAST and sum(num_bytes for _, num_bytes in waiting) > _AHEAD_BYTES:
                yield take()
        while waiting:
            yield take()
    finally:
        made = [part for part, _ in waiting if isinstance(part, Future)]
        for future in made:
            future.cancel()
        wait(made)  # they read from files that the caller closes
