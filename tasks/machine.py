"""What this machine has: memory of the host, memory of its GPUs.

Ring: edge (reads /proc, cgroups and nvidia-smi; changes nothing).  Units: bytes.
"""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import CapacityError

_CGROUPS = (  # version 2, version 1: limit, used, the part of it that is file cache
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU as nvidia-smi sees it."""

    name: str
    total_bytes: int
    free_bytes: int


def available_memory_bytes() -> int:
    """Return the memory that can be had without swapping (MemAvailable, capped by the cgroup)."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        available = int(fields.get("MemAvailable", f"{available // 1024} kB").split()[0]) * 1024
    return min([available, *(room for room in (_cgroup_room(*names) for names in _CGROUPS) if room is not None)])


def _cgroup_room(limit: str, used: str, cache: str) -> int | None:
    """Return what a cgroup still allows; its file cache is given back on demand and so counts as free."""
    folder = Path(limit).parent
    try:
        text, taken = Path(limit).read_text().strip(), int(Path(used).read_text())
        stat = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines() if " " in line)
        return None if text == "max" else int(text) - taken + int(stat.get(cache, "0"))
    except (OSError, ValueError):
        return None


def require_memory(needed_bytes: int, step: str, way_out: str) -> None:
    """Raise CapacityError before `step` starts when the machine has too little memory."""
    available = available_memory_bytes()
    if available < needed_bytes:
        raise CapacityError(
            f"{step} needs about {needed_bytes / 1e9:.1f} GB of memory but only {available / 1e9:.1f} GB are "
            f"available: {way_out}"
        )


def list_gpus() -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves us, in its order; none when nvidia-smi does not answer."""
    return parse_gpus(_ask_gpus("uuid,name,memory.total,memory.free"), os.environ.get("CUDA_VISIBLE_DEVICES"))


def old_gpus(capability: float) -> list[str]:
    """Return `name (compute capability)` of each GPU of the machine that is older; a driver that can't tell has none.

    Asked apart from the memory: drivers before 510 refuse the whole question.
    """
    rows = [line.rsplit(", ", 1) for line in _ask_gpus("name,compute_cap").splitlines()]
    told = [(row[0], row[1]) for row in rows if len(row) == 2 and row[1].replace(".", "", 1).isdigit()]
    return [f"{name} (compute capability {has})" for name, has in told if float(has) < capability]


def _ask_gpus(columns: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def wait_for_gpu_memory(free_before: list[int], timeout_s: float = 30.0, tolerance_bytes: int = 1 << 30) -> str:
    """Wait until each GPU has as much free memory again as it had; return what is missing after that, else empty.

    A process that held a GPU is gone before its driver has given everything back.

    Args:
        free_before: free bytes of each GPU, in nvidia-smi's order, before the process was started.
        timeout_s: how long to wait.
        tolerance_bytes: what somebody else may have taken since.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        now = [gpu.free_bytes for gpu in list_gpus()]
        missing = [
            f"GPU {number}: {free / 1e9:.1f} GB are free, {before / 1e9:.1f} were"
            for number, (free, before) in enumerate(zip(now, free_before, strict=False))
            if free < before - tolerance_bytes
        ]
        if not missing or time.monotonic() > deadline:
            return "; ".join(missing)
        time.sleep(0.5)


def parse_gpus(answer: str, visible: str | None = None) -> list[Gpu]:
    r"""Read nvidia-smi's table of UUID, name, total and free MiB; GPUs without numbers (errors) are left out.

    Args:
        answer: nvidia-smi's; it lists every GPU, whatever CUDA_VISIBLE_DEVICES says.
        visible: CUDA_VISIBLE_DEVICES, numbers or beginnings of UUIDs; as CUDA reads it, an entry that fits none ends
            the list. A MIG slice has no line of its own, and with one every GPU counts.

    >>> table = "GPU-a1, NVIDIA H100, 81559, 80994\nGPU-b2, NVIDIA L4, 23034, 22000\n"
    >>> [[gpu.name for gpu in parse_gpus(table, said)] for said in (None, "1", "GPU-b2,0", "", "1,7,0")]
    [['NVIDIA H100', 'NVIDIA L4'], ['NVIDIA L4'], ['NVIDIA L4', 'NVIDIA H100'], [], ['NVIDIA L4']]
    """
    rows = [line.split(", ", 1)[:1] + line.rsplit(", ", 2) for line in answer.splitlines()]
    rows = [row for row in rows if len(row) == 4]
    if visible is not None and "MIG" not in visible:
        rows = _visible(rows, visible.split(","))
    return [
        Gpu(name=name.partition(", ")[2], total_bytes=int(total) << 20, free_bytes=int(free) << 20)
        for _, name, total, free in rows
        if total.isdigit() and free.isdigit()
    ]


def _visible(rows: list[list[str]], wanted: list[str]) -> list[list[str]]:
    found: list[list[str]] = []
    for entry in map(str.strip, wanted):
        number = int(entry) if entry.isdecimal() else -1
        fitting = [row for index, row in enumerate(rows) if index == number or (entry and row[0].startswith(entry))]
        if len(fitting) != 1:
            break
        found += fitting
    return found
