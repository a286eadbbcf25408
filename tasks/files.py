"""Write files so that a crash leaves the old one or the new one, never half of one.

    bytes -> temporary file beside the target -> fsync -> rename -> fsync of the folder

The only module that writes small files; big ones (shards, checkpoints) stream through
`aside()`. Also here: digests, safetensors headers, free-disk checks, folder locks.

Ring: edge (disk only).  Units: bytes.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.errors import CapacityError, CorruptError, MissingError

_CHUNK_BYTES = 1 << 22
_MAX_HEADER_BYTES = 100 << 20  # the limit that the safetensors library itself sets
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# What a file system that lacks a call answers: Google Drive and other FUSE mounts know no locks, modes or folder syncs.
UNSUPPORTED = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK, errno.EPERM})
logger = logging.getLogger(__name__)


@contextmanager
def where_supported() -> Iterator[None]:
    """Run a call that only makes things safer; a file system that does not have it does without."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with where_supported():
            os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Make a file's content durable, whoever wrote it, where the file system can."""
    with path.open("rb") as handle, where_supported():
        os.fsync(handle.fileno())


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success fsync it and rename it to `path`.

    On any error the temporary file is removed and `path` is what it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        with where_supported():
            temporary.chmod(0o666 & ~umask)  # mkstemp makes 0600 files; a served model is read by others
        fsync_file(temporary)
        temporary.replace(path)
        fsync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_strays(folder: Path) -> None:
    """Remove what a SIGKILL inside `aside` left below `folder`. The caller holds the folder's lock."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with aside(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to `path`, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented UTF-8 JSON, whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path) -> Any:  # Any: JSON is whatever the file holds; callers validate
    """Read a JSON file. Raises CorruptError naming the file when it does not parse."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path} is not JSON ({error}): delete it, its step will make it again") from error


def digest(path: Path) -> str:
    """Return the sha256 of a file as 64 hex digits. Cost: one read, constant memory."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def list_files(folder: Path) -> dict[str, int]:
    """Return relative path -> size in bytes of every regular file below `folder`, sorted by path."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def stamp(folder: Path) -> dict[str, str]:
    """Name the state of a folder without reading 40 GB: size and time of each file."""
    stats = {name: (folder / name).stat() for name in list_files(folder)}
    return {name: f"{stat.st_size}@{stat.st_mtime_ns}" for name, stat in stats.items()}


def free_bytes(path: Path) -> int:
    """Return the bytes that an unprivileged process may still write below `path`."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_disk(path: Path, needed_bytes: int, step: str) -> None:
    """Raise CapacityError before `step` starts when `path` has too little room."""
    free = free_bytes(path)
    if free < needed_bytes:
        raise CapacityError(
            f"{step} needs about {needed_bytes / 1e9:.1f} GB below {path} but only {free / 1e9:.1f} GB are free: "
            "free some space or point TATARA_HOME at a larger disk"
        )


def read_safetensors_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:  # Any: dtype, shape, offsets
    """Return (tensor name -> {dtype, shape, data_offsets}, offset of the first data byte).

    Raises CorruptError when the file is shorter than its header says, so a truncated shard is
    found in microseconds, before a tensor is read.
    Source: huggingface/safetensors, "Format": u64 little-endian N, N bytes of JSON, the data.
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES + 1
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise CorruptError(f"{path} ({size} bytes) has no whole safetensors header: download or make it again")
        try:
            header = json.loads(handle.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CorruptError(f"{path} has a torn safetensors header: download or make it again") from error
    header.pop("__metadata__", None)
    data_start = 8 + length
    data_end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if data_start + data_end != size:
        raise CorruptError(
            f"{path} has {size} bytes but its header describes {data_start + data_end}: download or make it again"
        )
    return header, data_start


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that make up a model or adapter: those of its index, the single one, the only one.

    A folder may hold the weights twice (Mistral's consolidated.safetensors); transformers reads what is returned
    here, whether each file is there or not. Empty without any.
    Raises: MissingError when there are several files and no index tells which count.
    """
    if (folder / _INDEX).is_file():
        return [folder / name for name in sorted(set(read_json(folder / _INDEX)["weight_map"].values()))]
    found = [folder / _SINGLE] if (folder / _SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        raise MissingError(
            f"{folder} has {len(found)} safetensors files but no {_INDEX} that says which count: download it again"
        )
    return found


@contextmanager
def lock_file(path: Path, what: str = "") -> Iterator[None]:
    """Hold an exclusive lock on `path` while the body runs; a second holder says so and waits.

    `what` is what the holder makes, for the log. The kernel releases the lock when the process dies, so a
    SIGKILL never leaves one behind. On a file system without locks nothing is held, and a warning says so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another run that makes %s", what or path)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            logger.warning("%s is on a disk without locks: run one session at a time there", path.parent)
        try:
            yield
        finally:
            with where_supported():
                fcntl.flock(handle, fcntl.LOCK_UN)
