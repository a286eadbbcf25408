"""What the machine has is read, and too little is said with numbers."""

import os
from pathlib import Path

import pytest

from tasks import machine as subject
from tasks.errors import CapacityError


def test_file_cache_of_a_cgroup_counts_as_free(tmp_path: Path):
    names = [str(tmp_path / name) for name in ("memory.max", "memory.current")]
    (tmp_path / "memory.max").write_text("8000\n")
    (tmp_path / "memory.current").write_text("7000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 5000\n")
    assert subject._cgroup_room(*names, "inactive_file") == 6000
    (tmp_path / "memory.max").write_text("max\n")
    assert subject._cgroup_room(*names, "inactive_file") is None
    assert subject._cgroup_room(str(tmp_path / "none"), names[1], "inactive_file") is None


def test_memory_is_said_with_numbers():
    available = subject.available_memory_bytes()
    assert available > 1 << 20
    subject.require_memory(1, "training", "-")
    with pytest.raises(CapacityError, match=r"training needs about 1000000\.0 GB of memory but only \d+\.\d GB are "):
        subject.require_memory(10**15, "training", "use a smaller base")
    with pytest.raises(CapacityError, match=r"available: use a smaller base$"):
        subject.require_memory(10**15, "training", "use a smaller base")


NVIDIA_SMI = """#!/bin/sh
echo "GPU-aaaa-1, NVIDIA H100 80GB HBM3, 81559, 300"
echo "GPU-bbbb-2, NVIDIA H100 80GB HBM3, 81559, 80994"
echo "GPU-cccc-3, NVIDIA L4, [N/A], [N/A]"
"""


@pytest.mark.parametrize(
    ("said", "free_mib"),
    [
        (None, [300, 80994]),
        ("1", [80994]),
        ("GPU-bbbb", [80994]),
        ("1,0", [80994, 300]),
        ("", []),
        ("-1", []),
        ("2", []),
        ("MIG-1f", [300, 80994]),
        ("1,GPU-none,0", [80994]),
    ],
)
def test_the_gpus_that_count_are_those_that_cuda_shows_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, free_mib: list[int]
):
    """nvidia-smi lists them all: the trainer would be planned for a GPU that it will not see."""
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if said is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    gpus = subject.list_gpus()
    assert [gpu.free_bytes >> 20 for gpu in gpus] == free_mib
    assert {gpu.name for gpu in gpus} <= {"NVIDIA H100 80GB HBM3"}


def test_gpu_memory_is_waited_for_and_what_stays_away_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """nvidia-smi is a stand-in: it gives the memory back at its third answer, of the second GPU never."""
    fake = tmp_path / "nvidia-smi"
    fake.write_text(
        f"#!/bin/sh\necho x >> {tmp_path}/asked\n[ $(wc -l < {tmp_path}/asked) -ge 3 ] && free=80000 || free=9000\n"
        'echo "GPU-1, H100, 81559, $free"\necho "GPU-2, H100, 81559, 100"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert subject.wait_for_gpu_memory([80000 << 20]) == ""
    assert (tmp_path / "asked").read_text().count("x") == 3
    said = subject.wait_for_gpu_memory([80000 << 20, 80000 << 20], timeout_s=0.1)
    assert said == "GPU 1: 0.1 GB are free, 83.9 were"
