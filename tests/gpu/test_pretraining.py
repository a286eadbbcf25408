"""The pretraining worker on a GPU: our kernels learn what transformers' do, resumed is uninterrupted.

    python -m pytest --noconftest tests/gpu/test_pretraining.py

The CPU twin is tests/tasks/pretrain/test_worker.py.
"""

from pathlib import Path

import pytest
import torch

from tests.tasks.pretrain import runs as subject

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]
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
    import shutil

    half = tmp_path / "half"
    shutil.copytree(folders["fused"], half)
    shutil.rmtree(half / "checkpoints" / "checkpoint-6")
    (half / "result.json").unlink()
    subject.run(corpus, half, **BF16)
    assert subject.losses(half) == pytest.approx(subject.losses(folders["fused"]), abs=0.02)
    assert [record["step"] for record in subject.records(half, "experts.jsonl")] == [1, 2, 3, 4, 5, 6]
