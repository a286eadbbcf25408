"""Write one shard in order and hash it beside: pieces from memory, and whole ranges of the base's files.

    producer thread: read, add, round  ->  caller: write, or copy_file_range  ->  hasher thread: sha256, finite?

Ranges never come into the process as tensors: the kernel copies them (or only links the extents, where the file
system shares them), and the hasher reads them back from the page cache a moment later.

Ring: edge (disk, threads).  Units: bytes.
"""

import errno
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import Self, TypeVar

import torch

from tasks.errors import CorruptError
from tasks.merge.reader import DTYPES, bytes_of

T = TypeVar("T")
BLOCK_BYTES = 4096  # what file systems share extents by
_PIECE_BYTES, _COPY_BYTES = 1 << 20, 64 << 20
_WAITING = 3  # pieces between two threads: 12 MB
_CANT_COPY = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}


class ShardWriter:
    """One file being written from its first byte to its last, and its sha256."""

    def __init__(self, handle: int, name_at: Callable[[int], str]) -> None:
        self._handle = handle
        self._name_at = name_at  # the tensor at a byte of the file, for errors
        self._size = 0
        self._hash = sha256()
        self._todo: queue.Queue[tuple[memoryview | range, str] | None] = queue.Queue(_WAITING)
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="merge-hash", daemon=True)

    @classmethod
    @contextmanager
    def opened(cls, handle: int, name_at: Callable[[int], str]) -> Iterator[Self]:
        """Hash in a thread while the body writes; the thread is gone afterwards."""
        writer = cls(handle, name_at)
        writer._thread.start()
        try:
            yield writer
        finally:
            writer._todo.put(None)
            writer._thread.join()

    def write(self, data: bytes | torch.Tensor) -> None:
        """Append bytes."""
        view = memoryview(data) if isinstance(data, bytes) else bytes_of(data)
        done = 0
        while done < len(view):
            done += os.write(self._handle, view[done:])
        self._size += len(view)
        self._hand_on(view, "")

    def copy(self, source: int, first: int, size: int, dtype: str) -> None:
        """Append a range of another file; its tensors are of type `dtype`, and must be finite."""
        for begin in range(0, size, _COPY_BYTES):
            count = min(_COPY_BYTES, size - begin)
            _copy_range(source, first + begin, count, self._handle)
            self._hand_on(range(self._size, self._size + count), dtype)
            self._size += count

    def digest(self) -> str:
        """Return the sha256 of all that was written. Raises: what the hasher met, a value that is not finite."""
        self._todo.put(None)
        self._thread.join()
        if self._failed:
            raise self._failed
        return self._hash.hexdigest()

    def _hand_on(self, item: memoryview | range, dtype: str) -> None:
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

    def _take(self, item: memoryview | range, dtype: str) -> None:
        if isinstance(item, memoryview):
            self._hash.update(item)
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


def is_finite(values: torch.Tensor) -> bool:
    """Say whether every value is a number. A sum tells in one pass; only a strange one is looked into."""
    if values.dtype == torch.uint8:
        return True
    return bool(torch.isfinite(values.sum(dtype=torch.float32))) or bool(torch.isfinite(values).all())


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


def ahead(items: Iterator[T], depth: int = _WAITING) -> Iterator[T]:
    """Yield what `items` yields, made in a thread up to `depth` items ahead."""
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: T | None, error: BaseException | None = None) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                made.put((item, error), timeout=0.2)
                return

    def produce() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:  # noqa: BLE001  # raised where the items are taken
            put(None, error)

    thread = threading.Thread(target=produce, name="merge-read", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # pyright: ignore[reportReturnType]  # None comes only with an error
            del item
    finally:
        stop.set()
        thread.join()
