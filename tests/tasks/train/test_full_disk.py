"""The disk runs full while a training goes on: it ends with numbers, and goes on from its last checkpoint."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tasks.artifacts import ArtifactStore
from tasks.checkpoints import checkpoint_step, is_disk_full, latest_checkpoint, require_room
from tasks.errors import CapacityError
from tasks.train.run import train_adapter
from tests.needs import mount_tmpfs
from tests.tasks.train import runs as subject
from tests.tasks.train.runs import SPEC, adapter_digest, losses, start, wait_for_step


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount_tmpfs(folder, "200m")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(disk: Path, left_bytes: int) -> None:
    """Leave that many bytes; 0: write until nothing more goes in, whoever writes beside."""
    free = shutil.disk_usage(disk).free
    with (disk / "ballast").open("ab", buffering=0) as ballast, suppress(OSError):
        ballast.write(b"\1" * (free - left_bytes))
        while not left_bytes:
            ballast.write(b"\1" * 4096)


@pytest.mark.chaos
def test_no_checkpoint_is_begun_that_the_disk_can_not_take(tmp_path: Path, disk: Path):
    inputs = subject.make_inputs(tmp_path)
    whole, folder = tmp_path / "whole", disk / "run"
    subject.run(inputs, whole, SPEC)
    process = start(inputs, folder, SPEC)
    wait_for_step(folder, 9, process)
    fill(disk, 30 << 20)
    process.join(60)
    told: dict[str, Any] = json.loads((folder / "failure.json").read_text())
    kept = checkpoint_step(latest_checkpoint(folder / "checkpoints"))
    assert told["error"] == "CapacityError" and kept >= 8
    assert f"the checkpoint of step {kept + 4} needs about 0.07 GB below {folder}/checkpoints" in told["message"]
    assert f"only 0.03 GB are free: checkpoint-{kept} is kept; free some space and run again" in told["message"]
    (disk / "ballast").unlink()
    subject.run(inputs, folder, SPEC)
    assert f"resuming from checkpoint-{kept}" in (folder / "output.log").read_text()
    assert losses(folder) == losses(whole)
    assert adapter_digest(folder) == adapter_digest(whole)


@pytest.mark.chaos
def test_a_disk_without_a_byte_left_for_the_reason_is_named_all_the_same(tmp_path: Path, disk: Path):
    packed, base = subject.make_artifacts(ArtifactStore(tmp_path / "home"), tmp_path)

    def fill_up(record: dict[str, Any]) -> None:
        if record["step"] >= 6:  # again and again: an old checkpoint that is dropped gives room back
            fill(disk, 0)

    spec = SPEC.model_copy(update={"max_steps": 400})  # it is looked at once a second: 24 steps may be over by then
    with pytest.raises(CapacityError, match=r"full.* free some space and run again"):
        train_adapter(packed, base, spec, ArtifactStore(disk), fill_up)


def test_a_checkpoint_takes_what_the_last_one_took(tmp_path: Path):
    with pytest.raises(CapacityError, match="needs about 12000"):
        require_room(tmp_path, 10**12, step=2)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(bytes(10))  # of two bytes a weight, not twelve
    require_room(tmp_path, 10**12, step=4)


@pytest.mark.parametrize("writer", ["python", "torch", "safetensors"])
def test_a_disk_that_runs_full_while_it_is_written_is_recognised(disk: Path, writer: str):
    fill(disk, 1 << 20)
    tensor = torch.zeros(1 << 20)
    with pytest.raises(Exception) as raised:
        if writer == "python":
            (disk / "file").write_bytes(b"\1" * (4 << 20))
        elif writer == "torch":
            torch.save(tensor, disk / "file")
        else:
            save_file({"tensor": tensor}, str(disk / "file"))
    assert is_disk_full(raised.value)
    assert not is_disk_full(ValueError("another fault"))
