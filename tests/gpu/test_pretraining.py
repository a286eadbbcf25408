"""The pretraining worker on a GPU: our kernels learn what transformers' do, resumed is uninterrupted.

    python -m pytest --noconftest tests/gpu/test_pretraining.py

The CPU twin is tests/tasks/pretrain/test_worker.py.
"""

import shutil
from pathlib import Path

import pytest
import torch

from tasks.pretrain.masters import join, split
from tests.tasks.pretrain import runs as subject

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]
SIZES = (4096, 1 << 22, 1)
BF16 = {"dtype": "bfloat16", "shape": {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return subject.write_corpus(tmp_path_factory.mktemp("inputs") / "corpus")


@pytest.fixture(scope="module")
def folders(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All at once: they are small."""
    top = tmp_path_factory.mktemp("runs")
    kinds = {
        "fused": {},
        "stock": {"kernels": "stock"},
        "selective": {"checkpointing": "selective"},
        "full": {"checkpointing": "full"},
        "adafactor": {"optimizer": "adafactor"},
        "windows": {"rows": "windows"},
        "windows_stock": {"rows": "windows", "kernels": "stock"},
    }
    running = {name: subject.start(corpus, top / name, **BF16, **changes) for name, changes in kinds.items()}
    for name, process in running.items():
        assert process.wait(400) == 0, (top / name / "output.log").read_text()[-3000:]
    return {name: top / name for name in kinds}


@pytest.mark.parametrize(
    ("ours", "theirs"), [("fused", "stock"), ("selective", "stock"), ("full", "stock"), ("windows", "windows_stock")]
)
def test_our_kernels_learn_what_stock_ones_learn(folders: dict[str, Path], ours: str, theirs: str):
    mine, stock = subject.losses(folders[ours]), subject.losses(folders[theirs])
    assert mine == pytest.approx(stock, abs=0.03)  # bf16; the loss falls by 0.6
    assert mine[-1] < mine[0] - 0.3
    norms = [[record["grad_norm"] for record in subject.records(folders[name])] for name in (ours, theirs)]
    assert norms[0][0] == pytest.approx(norms[1][0], rel=0.05)


def test_a_low_memory_optimizer_learns(folders: dict[str, Path]):
    losses = subject.losses(folders["adafactor"])
    assert losses[-1] < losses[0] - 0.1


def test_a_run_goes_on_where_it_was_stopped(corpus: Path, folders: dict[str, Path], tmp_path: Path):

    half = tmp_path / "half"
    shutil.copytree(folders["fused"], half)
    shutil.rmtree(half / "checkpoints" / "checkpoint-6")
    (half / "result.json").unlink()
    subject.run(corpus, half, **BF16)
    assert subject.losses(half) == pytest.approx(subject.losses(folders["fused"]), abs=0.02)
    assert [record["step"] for record in subject.records(half, "experts.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_masters_are_kept_to_the_bit():
    """The compiled kernels, of every size that they were compiled for."""
    for size in SIZES:
        bits = torch.randint(0, 0x7F7F8000, (size,), device="cuda", dtype=torch.int32)
        master = torch.where(torch.rand(size, device="cuda") < 0.5, bits, bits - (1 << 31)).int().view(torch.float32)
        weight, low = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
        split(master, weight, low)
        assert torch.equal(join(weight, low).view(torch.int32), master.view(torch.int32))
        assert ((weight.float() - master).abs() <= (master.bfloat16().float() - master).abs()).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_masters_that_two_gpus_share_are_those_of_one(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What two left half way, shared or not, one and two go on with."""
    common = {**BF16, "router_aux_loss_coef": 0.0, "learning_rate": 1e-3}
    kinds = {"fsdp2": {"num_processes": 2, "parallel": "fsdp2"}, "ddp": {"num_processes": 2}, "one": {}}
    for name, more in kinds.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1" if more else "0")
        subject.run(corpus, tmp_path / name, **common, **more)
    for name in ("fsdp2", "ddp"):
        assert subject.losses(tmp_path / name) == pytest.approx(subject.losses(tmp_path / "one"), abs=0.03)
    for begun, ended in (("fsdp2", "one"), ("fsdp2", "fsdp2"), ("one", "fsdp2")):
        half = tmp_path / f"{begun}-{ended}"
        shutil.copytree(tmp_path / begun, half)
        shutil.rmtree(half / "checkpoints" / "checkpoint-6")
        (half / "result.json").unlink()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1" if kinds[ended] else "0")
        subject.run(corpus, half, **common, **kinds[ended])
        assert subject.losses(half) == pytest.approx(subject.losses(tmp_path / begun), abs=0.03)
        lows = torch.load(half / "checkpoints" / "checkpoint-6" / "optimizer.pt", weights_only=True)["lows"]
        assert all(low.dtype == torch.int16 and low.any() for low in lows)
