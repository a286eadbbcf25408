"""Start PEFT's side beside the merge, and hold it against what was merged.

Ring: edge (starts a process, reads).
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from tasks import files
from tasks.children import bound
from tasks.environment import without_secrets
from tasks.errors import ServiceError, ShapeError
from tasks.gptoss.mxfp4 import BLOCK_VALUES
from tasks.merge.plan import MergePlan, Output, Stored
from tasks.merge.reader import DTYPES, Reader
from tasks.merge.sample import Sample, choose_sample, compare_delta, sampled_delta
from tasks.merge.stream import read_factors, unpacked_rows
from tasks.processes import last_lines

_ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 1800.0


class PeftSide:
    """A process that computes PEFT's deltas of the sampled blocks."""

    def __init__(self, adapter: Path, base: Path, folder: Path) -> None:
        self._result, self._log = folder / "deltas.safetensors", folder / "output.log"
        self._result.unlink(missing_ok=True)
        job = folder / "job.json"
        files.write_json(job, {"adapter": str(adapter), "base": str(base), "result": str(self._result)})
        env = without_secrets(os.environ)
        env.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), env.get("PYTHONPATH")]))
        with self._log.open("wb") as output:
            argv = [sys.executable, "-m", "tasks.merge.worker", str(job)]
            self._process = subprocess.Popen(bound(argv), env=env, stdout=output, stderr=subprocess.STDOUT)

    @classmethod
    @contextmanager
    def started(cls, adapter: Path, base: Path, folder: Path) -> Iterator[Self]:
        """Run it while the body merges; it does not outlive the body."""
        side = cls(adapter, base, folder)
        try:
            yield side
        finally:
            side._process.kill()
            side._process.wait()

    def check(self, plan: MergePlan, base: Reader, deltas: Reader, merged: Reader) -> dict[str, Any]:
        """Compare every changed parameter. Returns {"tensors", "values", "largest_gap"}: shares of a delta's norm.

        Raises: ShapeError naming the parameter that differs, ServiceError when PEFT can't answer.
        """
        if self._process.wait(timeout=_TIMEOUT_S):
            lines = last_lines(self._log)
            raise ServiceError(f"PEFT can't put this adapter on this base; its last lines:\n{lines}")
        changed = {output.name: output for output in plan.outputs if output.change}
        with Reader.opened(self._result.parent) as answer:
            theirs = {name: answer.tensor(name) for name in answer.headers}
        if theirs.keys() != changed.keys():
            differing = ", ".join(sorted(theirs.keys() ^ changed.keys()))
            raise ShapeError(f"PEFT changes other parameters than this merge: {differing}")
        gaps = [_check_one(changed[name], delta, base, deltas, merged) for name, delta in theirs.items()]
        values = sum(delta.numel() for delta in theirs.values())
        return {"tensors": len(gaps), "values": values, "largest_gap": max(gaps)}


def _check_one(output: Output, theirs: torch.Tensor, base: Reader, deltas: Reader, merged: Reader) -> float:
    assert output.change is not None
    sample = choose_sample(output.name, output.shape)
    ours = sampled_delta(read_factors(output, output.change, deltas), output.change.scale, sample)
    gap = compare_delta(output.name, ours, theirs)
    written = _block(output.stored, merged, sample)
    expected = _block(output.sources, base, sample).double() + theirs.double()
    if bool(((written.double() - expected).abs() > _allowed(output, expected, theirs)).any()):
        raise ShapeError(f"{output.name} was not written as base plus delta: the disk is damaged, or this is a bug")
    return gap


def _block(stored: tuple[Stored, ...], reader: Reader, sample: Sample) -> torch.Tensor:
    """Read a block of a parameter, unpacked: (S, M, N), or (M, N) of a matrix."""
    (first, rows), (left, right) = _ends(sample.rows), _ends(sample.columns)
    if len(stored) == 2:
        experts = [unpacked_rows(stored, reader, e, left, right - left)[:, sample.rows].T for e in sample.experts]
        return torch.stack(experts)
    height, width = stored[0].shape[-2:]
    blocks = [
        reader.read(stored[0], (e * height + first) * width, (rows - first) * width).reshape(-1, width)
        for e in sample.experts or (0,)
    ]
    block = torch.stack(blocks)[..., sample.columns]
    return block if sample.experts else block[0]


def _ends(span: slice) -> tuple[int, int]:
    return span.start, span.stop


def _allowed(output: Output, expected: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """How far a written value may be from its sum: one rounding, or half a step of MXFP4."""
    if len(output.stored) == 2:
        largest = expected.abs().unflatten(-2, (-1, BLOCK_VALUES)).amax(-2, keepdim=True)
        return (0.26 * largest).expand(*largest.shape[:-2], BLOCK_VALUES, -1).flatten(-3, -2)
    step = torch.finfo(DTYPES[output.stored[0].dtype]).eps  # twice what rounding to nearest can move
    return step * (expected.abs() + delta.abs()) + 1e-30
