"""Write one shard of the merged model: header, then every part in order, and what was changed in it.

Ring: edge (disk).
"""

import json
import struct
from bisect import bisect_right
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch

from tasks import files
from tasks.merge.output import BLOCK_BYTES, CachedFile, DirectFile
from tasks.merge.plan import Output, Stored
from tasks.merge.reader import Buffers, Reader
from tasks.merge.report import ledger_rows
from tasks.merge.stream import BUFFER_BYTES, Range, Tally, shard_parts
from tasks.merge.writer import ShardWriter, in_order

_WORTH_SHARING_BYTES = 1 << 20


def write_shard(
    outputs: tuple[Output, ...],
    base: Reader,
    deltas: Reader,
    path: Path,
    record: Path,
    *,
    pool: Executor,
    past_cache: bool,
) -> None:
    """Stream one shard to disk, hashing as it goes; then write down its size, digest and ledger rows.

    Its pieces are made in `pool`. With `past_cache` the page cache does not hold it afterwards (`output.py`).

    Raises: CorruptError, ShapeError (`stream.py`); OSError when the disk is full.
    """
    stored = [tensor for output in outputs for tensor in output.stored]
    starts = [0]
    for tensor in stored:
        starts.append(starts[-1] + tensor.num_bytes)
    head = _header(stored, starts, _source_of_largest(outputs, base))
    tallies: dict[str, Tally] = {}

    def name_at(position: int) -> str:
        return stored[bisect_right(starts, position - len(head)) - 1].name

    with files.aside(path) as temporary, temporary.open("w+b", buffering=0) as handle:
        buffers = Buffers(BUFFER_BYTES)
        output = (DirectFile if past_cache else CachedFile)(handle.fileno())
        with ShardWriter.opened(output, name_at, buffers) as writer:
            writer.write(torch.frombuffer(bytearray(head), dtype=torch.uint8))
            for part in in_order(shard_parts(outputs, base, deltas, tallies, buffers), pool):
                if isinstance(part, Range):
                    writer.copy(part.handle, part.first, part.size, part.dtype)
                else:
                    writer.write(part)
            done = {"sha256": writer.digest(), "bytes": handle.tell()}
        files.write_json(record, done | ledger_rows(outputs, deltas.headers, tallies, path.name))


def _source_of_largest(outputs: tuple[Output, ...], base: Reader) -> tuple[str, int]:
    """Return (name, first byte in the base's file) of the largest tensor that is copied; ("", 0) without one."""
    copied = [tensor for output in outputs if output.is_copied for tensor in output.stored]
    largest = max(copied, key=lambda tensor: tensor.num_bytes, default=None)
    if largest is None or largest.num_bytes < _WORTH_SHARING_BYTES:
        return "", 0
    return largest.name, base.place(largest.name)[1]


def _header(stored: list[Stored], starts: list[int], source: tuple[str, int]) -> bytes:
    """Return the safetensors header, padded with spaces.

    The largest copied tensor comes to lie in its blocks as it does in the base's file: only then can a file
    system share the extents instead of copying them.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # Any: safetensors header entries
    for tensor, first, end in zip(stored, starts, starts[1:], strict=False):
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    name, first = source
    if name:
        lacking = (first - entries[name]["data_offsets"][0] - 8 - len(text)) % BLOCK_BYTES
        text += b" " * (lacking if lacking % 8 == 0 else 0)
    return struct.pack("<Q", len(text)) + text
