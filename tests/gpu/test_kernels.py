"""Our kernels on a GPU in bf16 against plain float32 arithmetic; CPU twins in tests/tasks/gptoss."""

from types import SimpleNamespace

import pytest
import torch

from tasks.gptoss import norm, rotation, rows
from tasks.gptoss.attention import attend_with_sinks, find_documents
from tasks.gptoss.experts import run_experts
from tasks.gptoss.product import Pair, Product, keep_extended, round_up
from tasks.reinforce.pages import attend_over_pages
from tasks.train.loss import FrozenHeadLoss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def gap(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """|ours - exact| / |exact|."""
    return ((ours.float() - exact).norm() / exact.norm()).item()


def plain_attention(q, k, v, sinks, position_ids, window, scale):
    copies = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
    document = (position_ids[0] == 0).cumsum(0)
    place = torch.arange(len(q), device=q.device)
    back = place[:, None] - place[None]
    seen = (document[:, None] == document[None]) & (back >= 0) & (back < (window or len(q)))
    logits = torch.einsum("nad,mad->anm", q, k) * scale
    logits = logits.masked_fill(~seen, float("-inf"))
    column = sinks[:, None, None].expand(-1, len(q), 1)
    return torch.einsum("anm,mad->nad", torch.cat([logits, column], -1).softmax(-1)[..., :-1], v)


MIXED, EQUAL = (1, 700, 129, 128, 300), (2048, 2048)  # the second is cuDNN's without a window


@pytest.mark.parametrize(
    ("lengths", "window"), [(MIXED, None), (MIXED, 128), (MIXED, 127), (EQUAL, None), (EQUAL, 128)]
)
def test_attention_with_sinks(lengths: tuple[int, ...], window: int | None):
    torch.manual_seed(0)
    position_ids = torch.cat([torch.arange(n, device="cuda") for n in lengths])[None]
    total = sum(lengths)
    wide = [torch.randn(total, heads, 64, device="cuda") for heads in (64, 8, 8)]
    wide = [part.bfloat16().float().requires_grad_() for part in wide]
    sinks = torch.randn(64, device="cuda").requires_grad_()
    exact = plain_attention(*wide, sinks, position_ids, window, 0.125)
    dout = torch.randn_like(exact).bfloat16().float()
    exact_grads = torch.autograd.grad(exact, (*wide, sinks), dout)
    narrow = [part.detach().bfloat16().requires_grad_() for part in wide]
    ours = attend_with_sinks(*narrow, sinks, find_documents(position_ids), window=window, scale=0.125)
    grads = torch.autograd.grad(ours, (*narrow, sinks), dout.bfloat16())
    assert gap(ours, exact) < 5e-3
    for name, mine, true in zip("qkvs", grads, exact_grads, strict=True):
        assert gap(mine, true) < 1e-2, name


class Pages:
    """transformers' cache of one layer, where keys and values lie in order already."""

    def __init__(self, window: int | None) -> None:
        self.layer_to_allocator = [SimpleNamespace(sliding_window=window)]

    def update(self, key_states, value_states, layer_idx, kwargs):
        return key_states, value_states


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("queries", [(1, 1, 1, 1), (1, 300, 1, 70), (640, 1, 1, 1)])
def test_attention_over_pages_is_that_of_a_cpu(queries: tuple[int, ...], has_sinks: bool, window: int | None):
    torch.manual_seed(0)
    keys = [total if count == 1 else count for count, total in zip(queries, (640, 1, 129, 33), strict=True)]
    ends = [torch.tensor([0, *counts]).cumsum(0).int() for counts in (queries, keys)]
    padded = [torch.cat([each, each[-1:].expand(2)]) for each in ends]  # two requests that are not there
    query, key, value = (
        torch.randn(1, heads, count, 64).bfloat16()
        for heads, count in ((64, sum(queries) + 5), (8, sum(keys) + 9), (8, sum(keys) + 9))
    )
    layer = torch.nn.Module()
    layer.layer_idx, sinks = 0, torch.randn(64)

    def run(device: str, dtype: torch.dtype) -> torch.Tensor:
        there = [each.to(device, dtype) for each in (query, key, value)]
        told = {"cu_seq_lens_q": padded[0].to(device), "cu_seq_lens_k": padded[1].to(device)}
        told |= {"max_length_q": max(queries), "max_length_k": 1024, "cache": Pages(window)}
        with torch.no_grad():
            told |= {"s_aux": sinks.to(device) if has_sinks else None}
            out, _ = attend_over_pages(layer, *there, None, 0.125, sliding_window=window, **told)
        return out.cpu().float()

    exact, ours = run("cpu", torch.float32), run("cuda", torch.bfloat16)
    assert gap(ours, exact) < 5e-3
    assert not ours[0, sum(queries) :].any()


@pytest.mark.parametrize(("recompute", "extend"), [(False, True), (True, True), (True, False)])
def test_experts(recompute: bool, extend: bool):
    torch.manual_seed(0)
    num, hidden, inner, tokens, chosen, rank = 8, 256, 192, 500, 2, 4

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * scale).bfloat16().float()

    base = {
        "gate_up": draw(num, hidden, 2 * inner, scale=hidden**-0.5),
        "gate_up_bias": draw(num, 2 * inner),
        "down": draw(num, inner, hidden, scale=inner**-0.5),
        "down_bias": draw(num, hidden),
    }
    index = torch.stack([torch.randperm(num - 2, device="cuda")[:chosen] + 1 for _ in range(tokens)])  # 0 and 7: none
    leaves = [
        draw(tokens, hidden),
        draw(tokens, chosen).softmax(-1).bfloat16().float(),
        draw(num * rank, hidden, scale=hidden**-0.5),
        draw(2 * inner, num * rank),
        draw(num * rank, inner, scale=inner**-0.5),
        draw(hidden, num * rank),
    ]
    dy = draw(tokens, hidden)

    def run(dtype: torch.dtype) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        mine = [leaf.to(dtype if place < 2 else torch.float32).requires_grad_() for place, leaf in enumerate(leaves)]
        x, weight, a1, b1, a2, b2 = mine
        products = []
        for name, a, b in (("gate_up", a1, b1), ("down", a2, b2)):
            w, bias = torch.nn.Parameter(base[name].to(dtype)), base[f"{name}_bias"].to(dtype)
            kept = keep_extended(w, bias, rank) if extend else None
            pair = Pair(a_PI=a, b_OQ=b, scale=0.5, num_experts=num)
            products.append(Product(w_EIO=w.detach(), bias_EO=bias, pair=pair, extended=kept))
        y = run_experts(x, index, weight, *products, alpha=1.702, limit=7.0, recompute=recompute)
        return y, torch.autograd.grad(y, mine, dy.to(dtype))

    def plain() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        mine = [leaf.clone().requires_grad_() for leaf in leaves]
        x, weight, a1, b1, a2, b2 = mine
        y = 0
        for slot in range(chosen):
            e = index[:, slot]
            changed = []
            for w, a, b in ((base["gate_up"], a1, b1), (base["down"], a2, b2)):
                delta = torch.einsum("ore,eri->eio", b.view(-1, rank, num), a.view(num, rank, -1))
                changed.append(w + 0.5 * delta)
            h = torch.einsum("nh,nhg->ng", x, changed[0][e]) + base["gate_up_bias"][e]
            gate, up = h[:, ::2].clamp(max=7.0), h[:, 1::2].clamp(-7.0, 7.0)
            g = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            out = torch.einsum("nf,nfh->nh", g, changed[1][e]) + base["down_bias"][e]
            y = y + out * weight[:, slot, None]
        return y, torch.autograd.grad(y, mine, dy)

    exact, exact_grads = plain()
    ours, grads = run(torch.bfloat16)
    assert gap(ours, exact) < 1e-2
    for name, mine, true in zip(("x", "weight", "a1", "b1", "a2", "b2"), grads, exact_grads, strict=True):
        assert gap(mine, true) < 2e-2, name
    idle = grads[2].view(num, rank, hidden)[[0, num - 1]]
    assert not idle.any()


@pytest.mark.parametrize(
    ("tokens", "num", "chosen", "hidden", "rank"), [(5, 8, 2, 16, 3), (4096, 32, 4, 2880, 8), (700, 128, 4, 96, 16)]
)
def test_rows_are_sorted_and_spread_as_on_a_cpu(tokens: int, num: int, chosen: int, hidden: int, rank: int):
    torch.manual_seed(0)
    index, x, u = torch.rand(tokens, num).topk(chosen)[1], torch.randn(tokens, hidden), torch.randn(tokens, num * rank)
    x, u, wide = x.bfloat16(), u.bfloat16(), round_up(rank)

    def run(device: str) -> list[torch.Tensor]:
        there = [each.to(device) for each in (index, x, u)]
        order, place, ends = rows.sort_rows(there[0], num)
        both, kept = rows.spread_with(there[1], there[2], there[0], order, rank, wide)
        again = rows.spread_again(there[1], kept, order, chosen)
        plain = [spread(there[1], order, chosen) for spread in (rows.spread, rows.spread_plain)]
        return [order, place, ends, both, kept, again, *plain]

    for ours, true in zip(run("cuda"), run("cpu"), strict=True):
        assert ours.dtype == true.dtype and torch.equal(ours.cpu(), true)


@torch.no_grad()
@pytest.mark.parametrize("width", [24, 2880])
def test_norms_are_those_of_a_cpu(width: int):
    torch.manual_seed(0)
    x, more, slope = (torch.randn(300, width).bfloat16() for _ in range(3))
    weight, apart = torch.rand(width).bfloat16(), torch.randn(300, width + 8).bfloat16()[:, :width]

    def run(device: str) -> list[torch.Tensor]:
        a, b, c, d, w = (each.to(device) for each in (x, more, slope, apart, weight))
        parts = norm.normed(a, w, 1e-5), norm.norm_wide(a, w, 1e-5, 40), *norm.add_norm(a, b, w, 1e-5)
        return [*parts, norm.norm_back(a, w, c, b, 1e-5), norm.norm_back(a, w, d, b, 1e-5)]

    for ours, true in zip(run("cuda"), run("cpu"), strict=True):
        assert gap(ours.cpu(), true.float()) < 2e-3
    total, normed = norm.add_norm(x.cuda(), more.cuda(), weight.cuda(), 1e-5)
    exact = norm.normed(x.cuda().float() + more.cuda().float(), weight.cuda().float(), 1e-5)
    assert gap(normed, exact) < 0.9 * gap(norm.normed(total, weight.cuda(), 1e-5), exact)  # not of the rounded sum


@torch.no_grad()
def test_rotation_is_that_of_a_cpu():
    torch.manual_seed(0)
    both, cos, sin = torch.randn(300, 80 * 64).bfloat16(), torch.randn(300, 32), torch.randn(300, 32)
    dq, dk, dv = (torch.randn(heads, 300, 64).bfloat16().transpose(0, 1) for heads in (64, 8, 8))

    def run(device: str) -> list[torch.Tensor]:
        whole, *parts, c, s = (each.to(device) for each in (both, dq, dk, dv, cos, sin))
        return [rotation.rotate(whole.clone(), c, s, 64), rotation.rotate_back(*parts, c, s)]

    for ours, true in zip(run("cuda"), run("cpu"), strict=True):
        assert gap(ours.cpu(), true.float()) < 2e-3


def test_head_loss():
    torch.manual_seed(0)
    hidden = torch.randn(3000, 256, device="cuda").bfloat16()
    weight = (torch.randn(20000, 256, device="cuda") / 16).bfloat16()
    target = torch.randint(20000, (3000,), device="cuda")
    mine, true = hidden.clone().requires_grad_(), hidden.float().requires_grad_()
    ours = FrozenHeadLoss.apply(mine, weight, target)
    exact = torch.nn.functional.cross_entropy(true @ weight.float().T, target, reduction="sum")
    ours.backward()
    exact.backward()
    assert abs(ours.item() / exact.item() - 1) < 1e-3
    assert gap(mine.grad, true.grad) < 1e-2
