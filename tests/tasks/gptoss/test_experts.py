"""Factored LoRA on fused experts is PEFT's, in value and gradient; GPU twin in tests/gpu/test_kernels.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import ShapeError
from tasks.gptoss.experts import run_experts
from tasks.gptoss.product import Pair, Product, keep_extended

ALPHA, LIMIT = 1.702, 7.0


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def plain(x, index, weight, tensors, pairs, scale):
    """Form W + BA for every expert, as PEFT does, and look each row's expert up."""
    num = len(tensors["gate_up"])
    changed = {}
    for name in ("gate_up", "down"):
        changed[name] = tensors[name]
        if name in pairs:
            a, b = pairs[name]
            rank = len(a) // num
            delta = torch.einsum("ore,eri->eio", b.view(-1, rank, num), a.view(num, rank, -1))
            changed[name] = changed[name] + scale * delta
    y = torch.zeros_like(x)
    for slot in range(index.shape[1]):
        e = index[:, slot]
        h = torch.einsum("nh,nhg->ng", x, changed["gate_up"][e]) + tensors["gate_up_bias"][e]
        gate, up = h[:, ::2].clamp(max=LIMIT), h[:, 1::2].clamp(-LIMIT, LIMIT)
        g = (up + 1) * gate * torch.sigmoid(ALPHA * gate)
        y = y + (torch.einsum("nf,nfh->nh", g, changed["down"][e]) + tensors["down_bias"][e]) * weight[:, slot, None]
    return y


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 30),
    num=st.integers(1, 6),
    rank=st.integers(1, 9),
    targets=st.sampled_from([(), ("gate_up",), ("down",), ("gate_up", "down")]),
    recompute=st.booleans(),
    extend=st.booleans(),
)
def test_value_and_gradients_are_those_of_w_plus_ba(seed, tokens, num, rank, targets, recompute, extend):
    torch.manual_seed(seed)
    hidden, inner, scale = 16, 24, 0.7
    chosen = min(2, num)
    sizes = {"gate_up": (hidden, 2 * inner), "down": (inner, hidden)}
    tensors = {name: draw(num, *size) / 4 for name, size in sizes.items()}
    tensors |= {f"{name}_bias": draw(num, size[1]) for name, size in sizes.items()}
    index = torch.stack([torch.randperm(num)[:chosen] for _ in range(tokens)])
    leaves = [draw(tokens, hidden) * 3, draw(tokens, chosen).softmax(-1)]
    for name in targets:
        leaves += [draw(num * rank, sizes[name][0]) / 4, draw(sizes[name][1], num * rank) / 4]
    dy = draw(tokens, hidden)

    def split(mine):
        return mine[0], mine[1], {name: mine[2 + 2 * n : 4 + 2 * n] for n, name in enumerate(targets)}

    expected_leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    x, weight, pairs = split(expected_leaves)
    expected = plain(x, index, weight, tensors, pairs, scale)
    expected_grads = torch.autograd.grad(expected, expected_leaves, dy)

    mine = [leaf.clone().requires_grad_() for leaf in leaves]
    x, weight, pairs = split(mine)
    products = []
    for name in ("gate_up", "down"):
        w, bias = torch.nn.Parameter(tensors[name].clone(), requires_grad=False), tensors[f"{name}_bias"]
        kept = keep_extended(w, bias, rank if name in targets else 0) if extend else None
        pair = None
        if name in targets:
            pair = Pair(a_PI=pairs[name][0], b_OQ=pairs[name][1], scale=scale, num_experts=num)
        products.append(Product(w_EIO=w, bias_EO=bias, pair=pair, extended=kept))
        torch.testing.assert_close(w.data, tensors[name], rtol=0, atol=0)
    ours = run_experts(x, index, weight, *products, alpha=ALPHA, limit=LIMIT, recompute=recompute)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(torch.autograd.grad(ours, mine, dy), expected_grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * max(1.0, wanted.abs().max().item()))


def test_a_pair_that_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match=r"does not fit 4 experts: A is \(E\*R, I\) = \(6, 3\)"):
        Pair(a_PI=torch.zeros(6, 3), b_OQ=torch.zeros(5, 6), num_experts=4, scale=1.0)
