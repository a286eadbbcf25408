"""The real worker on two GPUs, by DDP and with the base shared (FSDP2): both learn what one GPU learns.

    python -m pytest --noconftest tests/gpu/test_two_gpus.py

The CPU twin is tests/tasks/train/test_sharding.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.test_training import ROOT, ROW_TOKENS, SPEC, STEPS, adapter, inputs

__all__ = ["inputs"]  # a fixture
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.timeout(600),
]
TWO = {"num_processes": 2, "rows_per_device": 1, "deterministic": True}
SHARED = {**TWO, "parallel": "fsdp2"}
RUNS = {"one": {"deterministic": True}, "ddp": TWO, "fsdp2": SHARED, "ddp-apart": TWO}
APART = """
import runpy
from tasks.gptoss import forward
forward.join_layers = lambda *args, **kwargs: None
runpy.run_module("tasks.train.worker", run_name="__main__")
"""  # as with a base that is shared out: layers that are joined round otherwise
RECOMPUTED = {"selective": {"num_recomputed": 4}, "full": {}}


def start(inputs: Path, folder: Path, changes: dict[str, Any], **plan: Any) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    spec = {**SPEC, **changes}
    count = spec.get("num_processes", 1)
    whole = {"rows_per_device": spec["rows_per_device"], "gradient_accumulation": 1, "checkpointing": "none"}
    job = {
        "folder": str(folder),
        "spec": spec,
        "plan": {**whole, **plan},
        "base_folder": str(inputs / "base"),
        "packed_folder": str(inputs / "packed"),
        "row_tokens": ROW_TOKENS,
    }
    (folder / "job.json").write_text(json.dumps(job))
    argv = [sys.executable, "-m", "tasks.train.worker", str(folder / "job.json")]
    if folder.name == "ddp-apart":
        (folder / "apart.py").write_text(APART)
        argv[1:3] = [str(folder / "apart.py")]
    if count > 1:
        argv[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:count]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(seen), "PYTHONPATH": paths}
    log = (folder / "output.log").open("w")
    return subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], folder: Path) -> None:
    assert process.wait(300) == 0, (folder / "output.log").read_text()[-3000:]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folders(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All six at once: they are small."""
    top = tmp_path_factory.mktemp("runs")
    processes = {name: start(inputs, top / name, changes) for name, changes in RUNS.items()}
    for name, plan in RECOMPUTED.items():
        processes[name] = start(inputs, top / name, SHARED, checkpointing=name, **plan)
    for name, process in processes.items():
        finish(process, top / name)
    return {name: top / name for name in processes}


def test_ddp_and_fsdp2_learn_what_one_gpu_learns(folders: dict[str, Path]):
    one, ddp, fsdp2, apart = (losses(folders[name]) for name in RUNS)
    assert len(one) == STEPS and one[-1] < one[0] - 0.1
    assert ddp == pytest.approx(one, rel=5e-3)
    assert fsdp2 == pytest.approx(one, rel=5e-3)
    assert fsdp2 == pytest.approx(apart, rel=1e-4)  # the same sums: only the place of the base differs
    whole, shared = adapter(folders["ddp-apart"]), adapter(folders["fsdp2"])
    assert whole.keys() == shared.keys()
    for name, tensor in whole.items():
        assert (shared[name] - tensor).norm() < 0.02 * tensor.norm(), name


def test_each_gpu_holds_half_of_the_base(folders: dict[str, Path]):
    parts = re.findall(r"processes: ([\d,]+) of ([\d,]+) bytes here", (folders["fsdp2"] / "output.log").read_text())
    assert len(parts) == 2
    for part in parts:
        held, whole = (int(number.replace(",", "")) for number in part)
        assert 0.5 * whole <= held < 0.51 * whole


def half_way(whole: Path, folder: Path) -> Path:
    """What a kill after the first checkpoint leaves."""
    shutil.copytree(whole, folder)
    for name in (f"checkpoints/checkpoint-{STEPS}", "adapter"):
        shutil.rmtree(folder / name)
    (folder / "result.json").unlink()
    return folder


def test_a_shared_run_goes_on_to_the_bit_on_two_gpus_and_within_rounding_on_one(
    inputs: Path, folders: dict[str, Path], tmp_path: Path
):
    two, one = half_way(folders["fsdp2"], tmp_path / "two"), half_way(folders["fsdp2"], tmp_path / "one")
    processes = [(start(inputs, two, SHARED), two), (start(inputs, one, RUNS["one"]), one)]
    for process, folder in processes:
        finish(process, folder)
    assert losses(two) == losses(folders["fsdp2"])
    assert all(torch.equal(tensor, adapter(two)[name]) for name, tensor in adapter(folders["fsdp2"]).items())
    assert losses(one) == pytest.approx(losses(folders["fsdp2"]), rel=5e-3)


@pytest.mark.parametrize("checkpointing", RECOMPUTED)
def test_layers_are_gathered_again_for_what_is_recomputed(folders: dict[str, Path], checkpointing: str):
    assert losses(folders[checkpointing]) == pytest.approx(losses(folders["fsdp2"]), rel=5e-3)
