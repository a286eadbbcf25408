"""Rows, balance, head and plan of pretraining, each by itself."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flows.recipes import resolve_pretrain
from tasks.errors import SpecError
from tasks.gptoss.head import NOT_LEARNT, TrainedHeadLoss
from tasks.gptoss.layout import config_values, parameter_shapes
from tasks.pretrain.balance import balance_loss
from tasks.pretrain.plan import choose_attention, pretraining_needs
from tasks.pretrain.rows import TokenFile, collate, open_held_out, open_rows
from tasks.specs import change
from tests.tasks.pretrain.runs import SPEC

BASELINE = Path(__file__).resolve().parents[2] / "bench" / "baselines" / "pretrain_compact1b4_h200.json"
CASES = [case for part in ("speed", "two") for case in json.loads(BASELINE.read_text())[part].values()]
CASES = [case for case in CASES if case["changes"].get("masters", True)]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(2, 12))
def test_document_rows_are_the_corpus_cut_at_documents_and_at_the_row(sizes: list[int], row_tokens: int):
    corpus = TokenFile(ids_N=np.arange(sum(sizes), dtype="<u2"), ends_D=np.cumsum(sizes))
    rows = open_rows(corpus, change(SPEC, {"row_tokens": row_tokens}))
    read = [rows[number].tolist() for number in range(len(rows))]
    alone = {end - 1 for end, size in zip(np.cumsum(sizes), sizes, strict=True) if size % row_tokens == 1}
    assert list(chain.from_iterable(read)) == [token for token in range(sum(sizes)) if token not in alone]
    assert all(2 <= len(row) <= row_tokens for row in read)
    starts = {row[0] for row in read}
    assert {end - size for end, size in zip(np.cumsum(sizes), sizes, strict=True)} - alone <= starts
    assert [len(row) for row in read] == list(rows.lengths)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=20),
    st.floats(0.1, 99.0),
    st.sampled_from(["windows", "documents"]),
)
def test_what_is_held_out_is_the_end_of_the_corpus_and_in_no_row_that_is_learnt(
    sizes: list[int], share: float, kind: str
):
    total = sum(sizes)
    corpus = TokenFile(ids_N=np.arange(total, dtype="<u2"), ends_D=np.cumsum(sizes))
    spec = change(SPEC, {"validation_pct": share, "rows": kind, "row_tokens": 5})
    try:
        learnt, held_out = corpus.cut(spec)
    except SpecError as error:
        assert "validation_pct" in str(error)
        return
    place = len(learnt.ids_N)
    assert [*learnt.ids_N, *held_out.ids_N] == list(range(total))
    assert learnt.ends_D[-1] == place and held_out.ends_D[-1] == total - place
    wanted = round(total * (1 - share / 100))
    assert (place in corpus.ends_D and place <= wanted) or place == wanted
    assert total - place <= 2 * (total - wanted)
    rows, scored = open_rows(learnt, spec), open_held_out(held_out, spec)
    assert all(int(rows[number].max()) < place for number in range(len(rows)))
    assert all(int(row.min()) >= place for row in scored)
    whole, nothing = corpus.cut(SPEC)
    assert whole is corpus and not len(nothing.ids_N)


def test_many_held_out_rows_are_thinned_out_evenly():
    corpus = TokenFile(ids_N=np.arange(20_000, dtype="<u2"), ends_D=np.arange(10, 20_001, 10))
    rows = open_held_out(corpus, SPEC)
    assert len(rows) == 512 and rows[0][0] == 0 and rows[511][-1] == 19_999
    windows = open_held_out(corpus, change(SPEC, {"rows": "windows", "row_tokens": 64}))
    assert [int(row[0]) for row in windows] == list(range(0, 19_937, 64))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_a_pass_learns_each_token_but_the_first_of_a_row(sizes: list[int]):
    batch = collate([torch.arange(1, size + 1) for size in sizes])
    learnt = batch["labels"] != NOT_LEARNT
    assert learnt.sum() == sum(sizes) - len(sizes)
    assert torch.equal(batch["labels"][learnt], batch["input_ids"][learnt])
    assert torch.equal(batch["position_ids"] == 0, ~learnt)


def test_the_balance_loss_is_that_of_transformers_for_one_layer_and_sees_a_layer_that_collapsed():
    from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func

    torch.manual_seed(0)
    logits = torch.randn(40, 6, requires_grad=True)
    mine, counts = balance_loss([logits], 2)
    theirs = load_balancing_loss_func((logits,), num_experts=6, top_k=2)
    torch.testing.assert_close(mine, theirs)
    (grad,) = torch.autograd.grad(mine, logits)
    assert grad.any() and counts.sum() == 80
    first, last = torch.zeros(12, 6), torch.zeros(12, 6)
    first[:, :2], last[:, 2:4] = 9.0, 9.0
    assert balance_loss([first, last], 2)[0] > 5.9
    assert load_balancing_loss_func((first, last), num_experts=6, top_k=2) < 3.1  # type: ignore[operator]


def test_the_head_gives_loss_hits_and_both_gradients():
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    target = torch.randint(0, 50, (300,))
    logits = hidden @ weight.T
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    grads = torch.autograd.grad(expected, (hidden, weight))
    loss, hits = TrainedHeadLoss.apply(hidden, weight, target)
    assert hits == (logits.argmax(-1) == target).sum()
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(torch.autograd.grad(2 * loss, (hidden, weight)), grads, strict=True):
        torch.testing.assert_close(mine, 2 * theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["changes"]))
def test_memory_is_told_within_15_percent_of_what_was_measured(case: dict):
    spec = resolve_pretrain("compact_1b4", {"rows": "windows", "row_tokens": 4096, **case["changes"]})
    assert sum(pretraining_needs(spec).values()) == pytest.approx(case["peak_gb"] * 1e9, rel=0.15)


def test_the_seed_s_table_is_this_model():
    shape = resolve_pretrain("compact_1b4").shape
    sizes = {name: int(np.prod(size)) for name, size in parameter_shapes(shape).items()}
    total = sum(sizes.values())
    biases = sum(size for name, size in sizes.items() if name.endswith(("_proj.bias", "router.bias")))
    seed = total - shape.vocab_size * shape.hidden_size - biases  # tables counted once, no attention and router bias
    assert (total, seed) == (1_491_215_088, 1_442_041_488)
    config = config_values(shape)
    assert config["rope_parameters"]["factor"] == 1.0
    assert config["rope_parameters"]["original_max_position_embeddings"] == 4096  # vLLM's table of positions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows_per_step": 5, "num_processes": 2}, "rows_per_step=5 must be a multiple of num_processes=2"),
        ({"rows_per_device": 3}, "rows_per_device=3"),
        ({"parallel": "fsdp2", "optimizer": "adamw_8bit", "num_processes": 2}, "set optimizer='adamw'"),
        ({"row_tokens": 5000}, "row_tokens=5000 exceeds shape.context_tokens=64"),
        ({"row_tokens": 1}, "greater than or equal to 2"),
        ({"compact_vocabulary": True}, "on windows, without balance .* rows='documents', router_aux_loss_coef=0.01"),
        ({"checkpointing": "selective", "kernels": "stock"}, "selective' is of the fused experts only"),
    ],
)
def test_what_can_not_be_is_refused(changes: dict, message: str):
    with pytest.raises((ValidationError, SpecError), match=message):
        change(SPEC, changes)


def test_fused_kernels_are_refused_where_there_are_none():
    with pytest.raises(SpecError, match="needs dtype bfloat16 on a GPU"):
        choose_attention(change(SPEC, {"kernels": "fused"}), on_gpu=True)
    assert choose_attention(change(SPEC, {"dtype": "bfloat16"}), on_gpu=True) == "flash"
    assert choose_attention(SPEC, on_gpu=False) == "eager"
