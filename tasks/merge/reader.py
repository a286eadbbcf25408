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

    def read(self, stored: Stored, first: int, count: int) -> torch.Tensor:
        """Return `count` elements from element `first` on, flat.

        Raises: CorruptError when the file ends before them: it was cut while it was read.
        """
        dtype = DTYPES[stored.dtype]
        handle, start, size = self._places[stored.name]
        position, buffer = start + first * dtype.itemsize, torch.empty(count, dtype=dtype)
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


def bytes_of(values: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return values.reshape(-1).view(torch.uint8).numpy().data
