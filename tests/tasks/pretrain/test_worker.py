"""The pretraining worker on the CPU: every kernel, cut and launcher learns the same; killed is uninterrupted.

GPU twin: tests/gpu/test_pretraining.py.
"""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GptOssForCausalLM, Trainer

from tasks.checkpoints import checkpoint_step, latest_checkpoint
from tasks.pretrain.masters import join
from tasks.pretrain.rows import TokenFile, open_held_out
from tasks.specs import change
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


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param("adamw", marks=pytest.mark.slow),
        pytest.param("adafactor", marks=pytest.mark.chaos),
        pytest.param("adamw_8bit", marks=pytest.mark.chaos),
    ],
)
def test_bfloat16_weights_learn_what_float32_ones_learn_and_go_on_to_the_bit(
    corpus: Path, tmp_path: Path, optimizer: str
):
    """At a rate whose steps bfloat16 alone would lose: the masters move, and a checkpoint holds them."""
    small = {"learning_rate": 2e-5, "num_steps": 6, "optimizer": optimizer, "lr_scheduler": "constant_with_warmup"}
    subject.run(corpus, tmp_path / "wide", **small)
    subject.run(corpus, tmp_path / "narrow", **small, dtype="bfloat16")
    state = torch.load(tmp_path / "narrow" / "checkpoints" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert all(low.any() for low in state["lows"]), "a weight did not move"
    wide, narrow = weights(tmp_path / "wide"), weights(tmp_path / "narrow")
    model = GptOssForCausalLM.from_pretrained(tmp_path / "narrow" / "model", dtype=torch.bfloat16)
    decayed: Any = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]  # it uses no trainer
    names = sorted((name for name, _ in model.named_parameters()), key=lambda name: name not in decayed)
    norms = [name for name in names if "norm" in name]
    for name in norms:
        moved = wide[name] - 1
        master = join(narrow[name], state["lows"][names.index(name)])
        assert (narrow[name] == 1).all() and moved.norm() > 0, "bfloat16 alone stands still, float32 does not"
        assert (master - 1 - moved).norm() < 0.3 * moved.norm(), name
    assert len(norms) == 5
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "narrow", half)
    shutil.rmtree(half / "checkpoints" / "checkpoint-6")
    (half / "result.json").unlink()
    subject.run(corpus, half, **small, dtype="bfloat16")
    assert subject.losses(half) == subject.losses(tmp_path / "narrow")
    again = torch.load(half / "checkpoints" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert all(torch.equal(*pair) for pair in zip(again["lows"], state["lows"], strict=True))
    theirs = weights(tmp_path / "narrow")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(half).items())


@pytest.mark.chaos
def test_masters_that_two_share_are_those_of_one(corpus: Path, tmp_path: Path):
    """A run of two that share bfloat16 weights is stopped half way; one goes on with what they left."""
    common = {"dtype": "bfloat16", "router_aux_loss_coef": 0.0, "learning_rate": 1e-4}
    subject.run(corpus, tmp_path / "one", **common)
    shared = {**common, "num_processes": 2, "parallel": "fsdp2"}
    subject.run(corpus, tmp_path / "two", **shared)
    assert subject.losses(tmp_path / "two") == pytest.approx(subject.losses(tmp_path / "one"), abs=5e-3)
    for more in ({}, {"num_processes": 2, "parallel": "fsdp2"}):
        half = tmp_path / f"half{len(more)}"
        shutil.copytree(tmp_path / "two", half)
        shutil.rmtree(half / "checkpoints" / "checkpoint-6")
        (half / "result.json").unlink()
        subject.run(corpus, half, **common, **more)
        assert subject.losses(half) == pytest.approx(subject.losses(tmp_path / "two"), abs=5e-3)
        assert subject.losses(half)[:4] == subject.losses(tmp_path / "two")[:4]
        moments = [
            torch.load(folder / "checkpoints" / "checkpoint-6" / "optimizer.pt", weights_only=True)
            for folder in (half, tmp_path / "two")
        ]
        for mine, theirs in zip(*(state["inner"]["state"].values() for state in moments), strict=True):
            assert mine["exp_avg"].dtype == torch.float32 and mine["exp_avg"].shape == theirs["exp_avg"].shape
            assert (mine["exp_avg"] - theirs["exp_avg"]).norm() < 0.05 * theirs["exp_avg"].norm() + 1e-6


@pytest.mark.slow
def test_what_is_held_out_is_scored_on_the_way_and_at_the_end(corpus: Path, tmp_path: Path):
    held_out = {"validation_pct": 20, "eval_steps": 2, "num_steps": 4}
    result = subject.run(corpus, tmp_path, **held_out)
    scored = subject.records(tmp_path, "evaluations.jsonl")
    assert [at["step"] for at in scored] == [2, 4]
    assert result["validation_loss"] == pytest.approx(scored[-1]["eval_loss"])
    model = GptOssForCausalLM.from_pretrained(tmp_path / "model")
    tokens = TokenFile.open(corpus, "<u2")
    rest = tokens.cut(change(subject.SPEC, held_out))[1]
    total = count = 0.0
    for row in open_held_out(rest, subject.SPEC):
        loss = model(input_ids=row[None], labels=row[None]).loss.item()  # one row alone: no others to see
        total, count = total + loss * (len(row) - 1), count + len(row) - 1
    assert result["validation_loss"] == pytest.approx(total / count, abs=2e-3)


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
