"""How a shard's bytes reach its file: through the page cache, or past it.

    ShardWriter -> CachedFile    write; ranges of the base are copied, or only linked, by the kernel
                -> DirectFile    O_DIRECT, in blocks that begin at a page

Through the cache the next reader has the bytes at once, but every page has to be found, filled and later written. Where
cores are few that costs more than the merge itself (on two cores of a virtual machine 13 CPU seconds for 4 GB, past
the cache 2), and what the cache cannot hold throws out what others need.

Ring: edge (disk).  Units: bytes.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import tempfile
from pathlib import Path

from tasks.errors import CorruptError
from tasks.machine import available_memory_bytes

BLOCK_BYTES = 4096  # what file systems share extents by
_DIRECT_BYTES, _SYNC_BYTES = 4 << 20, 64 << 20
_FEW_CORES = 4
_SYNC_FILE_RANGE_WRITE = 2
_FICLONERANGE = 0x4020940D
_CANT_COPY = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}


def goes_past_cache(num_bytes: int, source: int, folder: Path) -> bool:
    """Say whether so many bytes are better written past the page cache; not where ranges of `source` can be linked."""
    is_dear = len(os.sched_getaffinity(0)) <= _FEW_CORES or num_bytes > available_memory_bytes() // 2
    return is_dear and not _shares_extents(source, folder)


def _shares_extents(source: int, folder: Path) -> bool:
    with tempfile.TemporaryFile(dir=folder) as probe:
        try:
            fcntl.ioctl(probe, _FICLONERANGE, struct.pack("qQQQ", source, 0, BLOCK_BYTES, 0))
        except OSError:  # another disk, or a file system that can't
            return False
    return True


class CachedFile:
    """Appends through the page cache."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self._size = self._begun = 0

    def write(self, data: memoryview) -> None:
        """Append bytes."""
        done = 0
        while done < len(data):
            done += os.write(self.handle, data[done:])
        self._grow(done)

    def copy(self, source: int, first: int, size: int) -> None:
        """Append a range of another file. Raises: CorruptError when that ends before it."""
        _copy_range(source, first, size, self.handle)
        self._grow(size)

    def finish(self) -> None:
        """Have every byte in the file."""

    def _grow(self, count: int) -> None:
        self._size += count
        if self._size - self._begun >= _SYNC_BYTES:  # the disk works while we do, not only at the fsync in the end
            _begin_writing(self.handle, self._begun, self._size - self._begun)
            self._begun = self._size


class DirectFile:
    """Appends past the page cache; on a file system that can't, through it."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self._block = mmap.mmap(-1, _DIRECT_BYTES)  # begins at a page, as O_DIRECT wants it
        self._filled = 0
        self._is_direct = False
        self._set_direct(True)

    def write(self, data: memoryview) -> None:
        """Append bytes: they are in the file when a block is full, or by `finish`."""
        done = 0
        while done < len(data):
            count = min(_DIRECT_BYTES - self._filled, len(data) - done)
            self._block[self._filled : self._filled + count] = data[done : done + count]
            self._filled, done = self._filled + count, done + count
            if self._filled == _DIRECT_BYTES:
                self._write_block()

    def finish(self) -> None:
        """Have every byte in the file: what fills no block goes through the cache."""
        self._set_direct(False)
        self._write_block()

    def _write_block(self) -> None:
        with memoryview(self._block) as whole, whole[: self._filled] as data:
            done = 0
            while done < len(data):
                try:
                    done += os.write(self.handle, data[done:])
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._is_direct:
                        raise
                    self._set_direct(False)  # larger blocks than ours, or the rest of a write that was cut short
        self._filled = 0

    def _set_direct(self, wanted: bool) -> None:
        flags = fcntl.fcntl(self.handle, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self.handle, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
            self._is_direct = wanted
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise


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
