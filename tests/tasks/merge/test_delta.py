"""A LoRA pair's dense change, against loops written from the definition, and against PEFT."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import ShapeError
from tasks.merge import delta as subject

sizes = st.integers(1, 4)


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


@given(sizes, sizes, sizes, st.integers(0, 999))
def test_linear_change_is_the_sum_over_ranks(rank: int, inputs: int, outputs: int, seed: int):
    a, b = _random(seed, rank, inputs), _random(seed + 1, outputs, rank)
    [(left, right)] = subject.factors(a, b, num_experts=0)
    delta = left @ right
    for o in range(outputs):
        for i in range(inputs):
            expected = sum(b[o, k].item() * a[k, i].item() for k in range(rank))
            assert delta[o, i].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(sizes, sizes, sizes, sizes, st.integers(0, 999), st.floats(0.1, 4))
def test_expert_change_is_the_sum_over_that_experts_ranks(
    experts: int, rank: int, inputs: int, outputs: int, seed: int, scale: float
):
    a, b = _random(seed, experts * rank, inputs), _random(seed + 1, outputs, experts * rank)
    pairs = subject.factors(a, b, num_experts=experts)
    deltas = [left @ right * scale for left, right in pairs]
    assert len(deltas) == experts
    for e, delta in enumerate(deltas):
        for i in range(inputs):
            for o in range(outputs):
                expected = scale * sum(a[e * rank + k, i].item() * b[o, k * experts + e].item() for k in range(rank))
                assert delta[i, o].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    norm = torch.stack(deltas).double().norm().item()
    assert subject.delta_norm(pairs, scale=scale) == pytest.approx(norm, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_expert_change_is_pefts(name: str):
    from peft import LoraConfig, get_peft_model

    from tests.tiny import SHAPE, make_model

    model = get_peft_model(make_model(), LoraConfig(r=3, lora_alpha=12, target_parameters=[f"mlp.experts.{name}"]))
    wrapper = model.base_model.model.model.layers[1].mlp.experts
    a, b = wrapper.lora_A["default"].weight.data, wrapper.lora_B["default"].weight.data
    a.copy_(_random(1, *a.shape))
    b.copy_(_random(2, *b.shape))
    pairs = subject.factors(a, b, num_experts=SHAPE.num_experts)
    ours = torch.stack([left @ right * 4.0 for left, right in pairs])
    theirs = wrapper.get_delta_weight("default")
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-5, atol=1e-5)
    assert ours.abs().max() > 1


def test_half_precision_pairs_are_multiplied_in_float32():
    a, b = _random(3, 2, 5).bfloat16(), _random(4, 3, 2).bfloat16()
    [(left, right)] = subject.factors(a, b, num_experts=0)
    assert (left.dtype, right.dtype) == (torch.float32, torch.float32)
    assert torch.equal(left @ right, b.float() @ a.float())


def test_a_norm_of_zero_is_zero():
    """It is how a LoRA B that never moved is found, so rounding must not make it positive."""
    pairs = subject.factors(_random(5, 8, 7), torch.zeros(6, 8), num_experts=2)
    assert subject.delta_norm(pairs, scale=3.0) == 0.0


def test_pairs_that_do_not_fit_are_named():
    with pytest.raises(ShapeError, match=r"does not fit a Linear: A is \(E\*R, I\) = \(2, 3\), B is .* = \(4, 5\)"):
        subject.factors(torch.ones(2, 3), torch.ones(4, 5), num_experts=0)
    for a, b in (((4, 3), (5, 6)), ((3, 3), (5, 3))):
        with pytest.raises(ShapeError, match=r"does not fit 2 experts: A is \(E\*R, I\)"):
            subject.factors(torch.ones(a), torch.ones(b), num_experts=2)
