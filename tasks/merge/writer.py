"""Write one shard in order and hash it beside: pieces from memory, and whole ranges of the base's files.

    maker threads: read, add, round  ->  caller: write, or copy_file_range  ->  hasher thread: sha256, finite?

Ranges never come into the process as tensors: the kernel copies them (or only links the extents, where the file
system shares them), and the hasher reads them back from the page cache a moment later.

Ring: edge (disk, threads).  Units: bytes.
"""

import ctypes
import errno
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
from tasks.merge.reader import DTYPES, Buffers, bytes_of, is_finite
from tasks.merge.stream import Piece, Range

BLOCK_BYTES = 4096  # what file systems share extents by
_PIECE_BYTES, _COPY_BYTES = 1 << 20, 64 << 20
_AT_LEAST, _AHEAD_BYTES = 1, 12 << 20  # pieces that are made before they are written
_WAITING = 3  # pieces between the writer and the hasher
_SYNC_FILE_RANGE_WRITE = 2
_CANT_COPY = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}


class ShardWriter:
    """One file being written from its first byte to its last, and its sha256."""

    def __init__(self, handle: int, name_at: Callable[[int], str], buffers: Buffers) -> None:
        self._handle = handle
        self._buffers = buffers  # of the pieces: they are given back when they are hashed
        self._name_at = name_at  # the tensor at a byte of the file, for errors
        self._size = self._begun = 0
        self._hash = sha256()
        self._todo: queue.Queue[tuple[torch.Tensor | range, str] | None] = queue.Queue(_WAITING)
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="merge-hash", daemon=True)

    @classmethod
    @contextmanager
    def opened(cls, handle: int, name_at: Callable[[int], str], buffers: Buffers) -> Iterator[Self]:
        """Hash in a thread while the body writes; the thread is gone afterwards."""
        writer = cls(handle, name_at, buffers)
        writer._thread.start()
        try:
            yield writer
        finally:
            writer._todo.put(None)
            writer._thread.join()

    def write(self, data: torch.Tensor) -> None:
        """Append a tensor's bytes."""
        view = bytes_of(data)
        done = 0
        while done < len(view):
            done += os.write(self._handle, view[done:])
        self._hand_on(data, "")
        self._grow(len(view))

    def copy(self, source: int, first: int, size: int, dtype: str) -> None:
        """Append a range of another file; its tensors are of type `dtype`, and must be finite."""
        for begin in range(0, size, _COPY_BYTES):
            count = min(_COPY_BYTES, size - begin)
            _copy_range(source, first + begin, count, self._handle)
            self._hand_on(range(self._size, self._size + count), dtype)
            self._grow(count)

    def digest(self) -> str:
        """Return the sha256 of all that was written. Raises: what the hasher met, a value that is not finite."""
        self._todo.put(None)
        self._thread.join()
        if self._failed:
            raise self._failed
        return self._hash.hexdigest()

    def _grow(self, count: int) -> None:
        self._size += count
        if self._size - self._begun >= _COPY_BYTES:  # the disk works while we do, not only at the fsync in the end
            _begin_writing(self._handle, self._begun, self._size - self._begun)
            self._begun = self._size

    def _hand_on(self, item: torch.Tensor | range, dtype: str) -> None:
        if self._failed:
            raise self._failed
        self._todo.put((item, dtype))

    def _run(self) -> None:
        while (task := self._todo.get()) is not None:
            item, dtype = task
            try:
                if self._failed is None:
                    self._take(item, dtype)
            except BaseException as error:  # noqa: BLE001  # raised in the caller's thread, by its next call
                self._failed = error
            del task, item

    def _take(self, item: torch.Tensor | range, dtype: str) -> None:
        if isinstance(item, torch.Tensor):
            self._hash.update(bytes_of(item))
            self._buffers.give(item)
            return
        buffer = bytearray(_PIECE_BYTES)
        for position in range(item.start, item.stop, _PIECE_BYTES):
            view = memoryview(buffer)[: min(_PIECE_BYTES, item.stop - position)]
            if os.preadv(self._handle, [view], position) != len(view):
                raise CorruptError(f"the shard being written is shorter than {position + len(view)} bytes")
            self._hash.update(view)
            values = torch.frombuffer(view, dtype=DTYPES.get(dtype, torch.uint8))
            if not is_finite(values):
                bad = position + int((~torch.isfinite(values)).nonzero()[0]) * values.itemsize
                raise CorruptError(
                    f"base tensor {self._name_at(bad)} holds a value that is not finite: download it again"
                )


def _begin_writing(handle: int, first: int, size: int) -> None:
    """Let the kernel begin to write dirty pages, without waiting; where it can't, the fsync in the end does it all."""
    sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if sync_file_range is not None:
        sync_file_range(handle, ctypes.c_int64(first), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)


def _copy_range(source: int, first: int, size: int, target: int) -> None:
    """Append a range of `source` to `target`, up to a block's start first: from there on extents can be shared."""
    end, part = first + size, -first % BLOCK_BYTES or size
    while first < end:
        count = _copy_once(source, first, min(part, end - first), target)
        if count == 0:
            raise CorruptError(f"the base ends {end - first} bytes too early: download it again")
        first += count
        part = -first % BLOCK_BYTES or size


def _copy_once(source: int, first: int, size: int, target: int) -> int:
    try:
        return os.copy_file_range(source, target, size, first)
    except OSError as error:
        if error.errno not in _CANT_COPY:
            raise
        return os.sendfile(target, source, first, size)  # another disk, or a file system that can't


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
