"""Read tensors of a folder of safetensors files piece by piece, without mapping them.

A mapped page counts as resident until the kernel takes it back, and a 120B base would fill the process; what
is read into a buffer of ours is gone when the buffer goes.

Ring: edge (disk only).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from tasks import files
from tasks.errors import CorruptError
from tasks.merge.plan import Stored

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
_AHEAD_BYTES = 16 << 20


class Reader:
    """Random access to the tensors of a folder; `headers` are in the order in which the tensors lie on disk."""

    def __init__(self, folder: Path) -> None:
        self.headers: dict[str, dict[str, Any]] = {}  # Any: dtype, shape, data_offsets
        self._places: dict[str, tuple[int, int, int]] = {}  # file, first byte, bytes
        self._handles: list[int] = []
        for shard in files.weight_files(folder):
            header, start = files.read_safetensors_header(shard)
            self._handles.append(os.open(shard, os.O_RDONLY))
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                first, end = entry["data_offsets"]
                self.headers[name] = entry
                self._places[name] = (self._handles[-1], start + first, end - first)

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator[Self]:
        """Open the folder's files and close them in the end."""
        reader = cls(folder)
        try:
            yield reader
        finally:
            for handle in reader._handles:
                os.close(handle)

    def place(self, name: str) -> tuple[int, int, int]:
        """Return (file, first byte, number of bytes) of a tensor."""
        return self._places[name]

    def read(self, stored: Stored, first: int, count: int, buffers: "Buffers | None" = None) -> torch.Tensor:
        """Return `count` elements from element `first` on, flat; in one of `buffers` when there are any.

        Raises: CorruptError when the file ends before them: it was cut while it was read.
        """
        dtype = DTYPES[stored.dtype]
        handle, start, size = self._places[stored.name]
        position = start + first * dtype.itemsize
        buffer = buffers.take(count, dtype) if buffers else torch.empty(count, dtype=dtype)
        view, done = bytes_of(buffer), 0
        os.posix_fadvise(handle, position + len(view), min(_AHEAD_BYTES, size), os.POSIX_FADV_WILLNEED)
        while done < len(view):
            got = os.preadv(handle, [view[done:]], position + done)
            if got == 0:
                raise CorruptError(
                    f"{stored.name} ends after {position + done - start} of {size} bytes: download it again"
                )
            done += got
        return buffer

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole tensor."""
        entry = self.headers[name]
        stored = Stored(name=name, dtype=entry["dtype"], shape=tuple(entry["shape"]))
        return self.read(stored, 0, stored.num_bytes // DTYPES[stored.dtype].itemsize).reshape(stored.shape)


class Buffers:
    """Memory that is used again: a page that the kernel must find and clear first costs more than the sum in it.

    Threads may take and give at once.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._free: list[torch.Tensor] = []

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return `count` elements, whatever they hold; more than a buffer has get memory of their own."""
        if count * dtype.itemsize > self._num_bytes:
            return torch.empty(count, dtype=dtype)
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = torch.empty(self._num_bytes, dtype=torch.uint8)
        return buffer.view(dtype)[:count]

    def give(self, taken: torch.Tensor) -> None:
        """Take back what nobody reads any more; what was not taken here is left alone."""
        storage = taken.untyped_storage()
        if storage.nbytes() == self._num_bytes and taken.storage_offset() == 0:
            self._free.append(torch.empty(0, dtype=torch.uint8).set_(storage))


def bytes_of(values: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return values.reshape(-1).view(torch.uint8).numpy().data


def is_finite(values: torch.Tensor) -> bool:
    """Say whether every value is a number. A sum tells in one pass; only a strange one is looked into."""
    if values.dtype == torch.uint8:
        return True
    return bool(torch.isfinite(values.sum(dtype=torch.float32))) or bool(torch.isfinite(values).all())
