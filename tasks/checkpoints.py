"""Checkpoints that count only when they are whole, and room on the disk for the next one.

    checkpoint-N/ written in place by Trainer -> mark_complete() -> COMPLETE.json lists its files
    latest_checkpoint() -> the newest that is whole; torn ones are removed

transformers' Trainer takes the highest number whatever it holds, and silently begins with a fresh optimizer where
optimizer.pt is missing. Here a checkpoint that was torn by a kill or a full disk is never resumed from. Paths inside
are not used, so a folder that was moved to another machine resumes as well.

Ring: edge (disk). Imports no torch.  Units: bytes.
"""

import errno
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path

from tasks import files
from tasks.errors import CapacityError, CorruptError

COMPLETE = "COMPLETE.json"
_NEEDED = ("optimizer", "scheduler", "trainer_state", "rng_state")  # what a resumed run can't be exact without
_SLACK_BYTES = 64 << 20  # tokenizer, state, random generators
_FULL = re.compile(r"No space left|PytorchStreamWriter failed|Disk quota exceeded|unexpected pos", re.IGNORECASE)
logger = logging.getLogger(__name__)


def mark_complete(checkpoint: Path) -> None:
    """Declare a checkpoint whole: every file on disk, then the list of them."""
    names = files.list_files(checkpoint)
    for name in names:
        files.fsync_file(checkpoint / name)
    files.write_json(checkpoint / COMPLETE, {name: size for name, size in names.items() if name != COMPLETE})


def is_complete(checkpoint: Path) -> bool:
    """Say whether a checkpoint was marked, each of its files still has its size, and none that must be is missing."""
    try:
        listed = files.read_json(checkpoint / COMPLETE)
    except (FileNotFoundError, NotADirectoryError, CorruptError):
        return False
    present = files.list_files(checkpoint)
    return all(present.get(name) == size for name, size in listed.items()) and not missing_parts(checkpoint)


def missing_parts(checkpoint: Path) -> list[str]:
    """Return which parts Trainer would silently begin anew without: optimizer, schedule, state, random generators."""
    names = [path.name for path in checkpoint.iterdir()]
    return [part for part in _NEEDED if not any(name.startswith(part) for name in names)]


def damaged_files(checkpoint: Path) -> list[str]:
    """Return the files of a whole checkpoint whose bytes are no longer what was written, though their number is.

    One that can't be loaded would end each try in the same error, with an older checkpoint beside it. Told by what the
    formats carry: torch's files are zip archives with checksums, of safetensors the header is read.  Cost: one read.
    """
    return [name for name in files.list_files(checkpoint) if not _is_sound(checkpoint / name)]


def _is_sound(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            files.read_safetensors_header(path)
        elif path.suffix == ".json":
            files.read_json(path)
        elif path.suffix in {".pt", ".pth"}:
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
    except (CorruptError, OSError, zipfile.BadZipFile):  # OSError: rank 0 removes it just now
        return False
    return True


def latest_checkpoint(folder: Path, *, is_owner: bool = True) -> Path | None:
    """Return the newest whole and undamaged `checkpoint-*`, or None; the owner (rank 0) removes newer ones."""
    for checkpoint in sorted(_all(folder), key=checkpoint_step, reverse=True):
        damaged = damaged_files(checkpoint) if is_complete(checkpoint) else ["not whole"]
        if not damaged:
            return checkpoint
        if is_owner:
            logger.warning("%s can't be resumed from (%s): removed", checkpoint.name, ", ".join(damaged))
            shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def drop_old(folder: Path, keep: int) -> None:
    """Remove all but the `keep` checkpoints of the highest steps.

    Not left to Trainer, which goes by the time of their folders: after a clock was set back, or a copy from another
    machine, the oldest seems to be the one that was just written.
    """
    for checkpoint in sorted(_all(folder), key=checkpoint_step)[:-keep]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def checkpoint_step(checkpoint: Path | None) -> int:
    """Return the optimizer step of a checkpoint; 0 for none."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def say_kept(folder: Path) -> str:
    """Name the newest whole checkpoint, for an error message; removes nothing."""
    whole = [checkpoint for checkpoint in _all(folder) if is_complete(checkpoint)]
    return f"{max(whole, key=checkpoint_step).name} is kept" if whole else "no checkpoint was written before"


def has_any(folder: Path) -> bool:
    """Say whether there is a whole checkpoint to go on from."""
    return any(is_complete(checkpoint) for checkpoint in _all(folder))


def require_room(folder: Path, num_trainable: int, step: int) -> None:
    """Raise CapacityError before the checkpoint of `step` is begun when the disk can't take it.

    What the last one took; of the first nobody knows: 12 bytes a trained parameter (weight, two moments in float32).
    """
    whole = [sum(files.list_files(checkpoint).values()) for checkpoint in _all(folder)]
    needed = max(whole, default=12 * num_trainable) + _SLACK_BYTES
    free = files.free_bytes(folder)
    if free < needed:
        raise CapacityError(
            f"the checkpoint of step {step} needs about {needed / 1e9:.2f} GB below {folder} but only "
            f"{free / 1e9:.2f} GB are free: {say_kept(folder)}; free some space and run again, it goes on from there"
        )


def is_disk_full(error: BaseException | None) -> bool:
    """Say whether an error is a full disk, in the words of Python, torch or safetensors."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return True
        if _FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def link_folder(source: Path, target: Path) -> None:
    """Make `target` hold the files of `source` without copying them, where the disk can."""
    shutil.rmtree(target, ignore_errors=True)
    if source.is_dir():
        try:
            shutil.copytree(source, target, copy_function=os.link)
        except (OSError, shutil.Error):  # a disk without hard links
            shutil.rmtree(target, ignore_errors=True)
            for name in files.list_files(source):  # not copytree, which fails where modes can't be set
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, target / name)


def _all(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
