"""The pretraining worker on the CPU: every kernel, cut and launcher learns the same; killed is uninterrupted.

GPU twin: tests/gpu/test_pretraining.py.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.checkpoints import checkpoint_step, latest_checkpoint
from tests.tasks.pretrain import runs as subject

IN_CI = ("fused", "fsdp2")  # the others take as long again
ALIKE: dict[str, dict[str, Any]] = {
    "stock": {"kernels": "stock"},
    "fused": {"kernels": "fused"},
    "selective": {"checkpointing": "selective"},
    "full": {"checkpointing": "full"},
    "in four passes": {"rows_per_device": 1, "router_aux_loss_coef": 0.0},
    "ddp": {"num_processes": 2, "router_aux_loss_coef": 0.0},
    "fsdp2": {"num_processes": 2, "parallel": "fsdp2", "router_aux_loss_coef": 0.0},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return subject.write_corpus(tmp_path_factory.mktemp("inputs") / "corpus")


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Uninterrupted runs in one process, by the weight of the balance loss (a mean over the tokens of a pass)."""
    top = tmp_path_factory.mktemp("whole")
    for coef in (0.0, 0.01):
        subject.run(corpus, top / str(coef), router_aux_loss_coef=coef)
    return {coef: top / str(coef) for coef in (0.0, 0.01)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_alike(folder: Path, other: Path) -> None:
    assert subject.losses(folder) == pytest.approx(subject.losses(other), abs=1e-3)
    theirs = weights(other)
    for name, tensor in weights(folder).items():
        assert (theirs.pop(name) - tensor).norm() < 0.02 * tensor.norm() + 1e-3, name
    assert not theirs


@pytest.mark.slow
def test_a_run_learns_and_says_how(whole: dict[float, Path]):
    records = subject.records(whole[0.01])
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert records[-1]["accuracy"] > records[0]["accuracy"]
    assert all(1.9 < record["router_aux_loss"] < 4 for record in records)  # 2 chosen: 2 is balanced
    assert "ppl " in (whole[0.01] / "output.log").read_text()
    usage = subject.records(whole[0.01], "experts.jsonl")
    assert [record["step"] for record in usage] == [1, 2, 3, 4, 5, 6]
    assert all(sum(layer) == pytest.approx(1, abs=1e-3) for record in usage for layer in record["usage"])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in IN_CI else pytest.mark.chaos) for name in ALIKE]
)
def test_every_way_learns_the_same(corpus: Path, whole: dict[float, Path], tmp_path: Path, name: str):
    changes = ALIKE[name]
    subject.run(corpus, tmp_path, **changes)
    assert_alike(tmp_path, whole[changes.get("router_aux_loss_coef", 0.01)])
    architectures = (tmp_path / "model" / "config.json").read_text()
    assert "GptOssForCausalLM" in architectures and "FSDP" not in architectures


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"num_processes": 2, "parallel": "fsdp2"}, marks=pytest.mark.chaos),
    ],
)
def test_a_killed_run_goes_on_where_it_was(corpus: Path, whole: dict[float, Path], tmp_path: Path, changes: Any):
    """In one process to the bit; what two that share the model left, one takes up."""
    changes = {**changes, "router_aux_loss_coef": 0.0}
    process = subject.start(corpus, tmp_path, **changes)
    deadline = time.monotonic() + 120
    while not checkpoint_step(latest_checkpoint(tmp_path / "checkpoints", is_owner=False)) and process.poll() is None:
        assert time.monotonic() < deadline, (tmp_path / "output.log").read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 2 <= checkpoint_step(latest_checkpoint(tmp_path / "checkpoints", is_owner=False)) <= 6
    subject.run(corpus, tmp_path, **{**changes, "num_processes": 1})
    assert [record["step"] for record in subject.records(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in subject.records(tmp_path, "experts.jsonl")] == [1, 2, 3, 4, 5, 6]
    if "parallel" in changes:
        assert_alike(tmp_path, whole[0.0])
        return
    assert subject.losses(tmp_path) == subject.losses(whole[0.0])
    theirs = weights(whole[0.0])
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(tmp_path).items())


@pytest.mark.chaos
def test_a_compact_vocabulary_learns_the_same_in_several_passes(corpus: Path, tmp_path: Path):
    compact = {"rows": "windows", "compact_vocabulary": True, "router_aux_loss_coef": 0.0, "num_steps": 3}
    subject.run(corpus, tmp_path / "one", **compact)
    subject.run(corpus, tmp_path / "four", **compact, rows_per_device=1)
    assert_alike(tmp_path / "four", tmp_path / "one")
    norms = [[record["grad_norm"] for record in subject.records(tmp_path / name)] for name in ("one", "four")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


@pytest.mark.slow
def test_windows_and_tied_tables_are_trained_and_loaded_by_transformers(corpus: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    subject.run(corpus, tmp_path, rows="windows", shape={"tie_embeddings": True}, optimizer="adafactor")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("iron sand", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()
