"""Float32 masters of bfloat16 weights: exact, and stepped as a float32 model is."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tasks.pretrain import masters
from tasks.pretrain.masters import SplitMasters, join, split

MAGNITUDES = st.integers(0, 0x7F7F7FFF)  # bits, up to the largest number that does not round to infinity


@given(st.lists(st.tuples(MAGNITUDES, st.sampled_from([0, -(1 << 31)])), min_size=1, max_size=40))
def test_weight_and_low_bits_are_the_master_and_the_weight_is_the_nearest(bits: list[tuple[int, int]]):
    master = torch.tensor([sum(pair) for pair in bits], dtype=torch.int32).view(torch.float32)
    weight, low = stored(master)
    assert torch.equal(join(weight, low).view(torch.int32), master.view(torch.int32))
    assert ((weight.float() - master).abs() <= (master.bfloat16().float() - master).abs()).all()


def stored(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight, low = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    split(master, weight, low)
    return weight, low


def train(dtype: torch.dtype, make: Any) -> tuple[list[torch.Tensor], Any]:
    """Return the weights in float32, after steps that bfloat16 alone would lose, and the optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)).bfloat16().to(dtype)
    optimizer: Any = make(list(model.parameters()))
    if dtype == torch.bfloat16:
        optimizer = SplitMasters(optimizer)
    for step in range(50):
        torch.manual_seed(step)
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape).bfloat16().to(dtype)
        optimizer.step()
        optimizer.zero_grad()
    if dtype == torch.float32:
        return [weight.detach() for weight in model.parameters()], optimizer
    parts = zip(optimizer.weights, optimizer.lows, strict=True)
    return [join(weight.detach().view(-1), low).view_as(weight) for weight, low in parts], optimizer


@pytest.mark.parametrize("at_once", [1 << 27, 1, 70])
@pytest.mark.parametrize(
    "make",
    [
        lambda weights: torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.1),
        lambda weights: torch.optim.AdamW(weights, lr=1e-5, fused=True),
        lambda weights: torch.optim.SGD([{"params": weights[:2]}, {"params": weights[2:], "lr": 1e-6}], lr=1e-5),
    ],
    ids=["adamw", "fused", "groups"],
)
def test_masters_step_as_float32_weights_do_to_the_bit(make: Any, at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(masters, "_AT_ONCE", at_once)
    wide, _ = train(torch.float32, make)
    mine, optimizer = train(torch.bfloat16, make)
    assert all(torch.equal(*pair) for pair in zip(mine, wide, strict=True))
    assert all(torch.equal(weight, stored(whole)[0]) for weight, whole in zip(optimizer.weights, wide, strict=True))
    assert not any(master.numel() or master.grad is not None for master in optimizer.masters)


def test_what_is_loaded_goes_on_to_the_bit():
    def make(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(weights, lr=1e-3)

    _, optimizer = train(torch.bfloat16, make)
    copies = [nn.Parameter(weight.detach().clone()) for weight in optimizer.weights]
    other = SplitMasters(make(copies))
    other.load_state_dict(deepcopy(optimizer.state_dict()))  # as from a file: torch shares tensors
    assert all(entry["exp_avg"].dtype == torch.float32 for entry in other.state.values())
    for weights in (optimizer.weights, copies):
        torch.manual_seed(9)
        for weight in weights:
            weight.grad = torch.randn(weight.shape).bfloat16()
    optimizer.step()
    other.step()
    assert all(torch.equal(*pair) for pair in zip(other.weights, optimizer.weights, strict=True))
    assert all(torch.equal(*pair) for pair in zip(other.lows, optimizer.lows, strict=True))


def test_a_weight_without_a_gradient_is_left_alone():
    weights = [nn.Parameter(torch.ones(4).bfloat16()) for _ in range(2)]
    optimizer = SplitMasters(torch.optim.AdamW(weights, lr=0.1))
    weights[0].grad = torch.ones(4).bfloat16()
    optimizer.step()
    assert (weights[0] < 1).all() and torch.equal(weights[1], torch.ones(4).bfloat16())
