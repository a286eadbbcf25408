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


@given(sizes, sizes, sizes, st.integers(0, 999), st.floats(0.1, 4))
def test_linear_change_is_the_sum_over_ranks(rank: int, inputs: int, outputs: int, seed: int, scale: float):
    a, b = _random(seed, rank, inputs), _random(seed + 1, outputs, rank)
    delta = subject.linear_delta(a, b, scale=scale)
    for o in range(outputs):
        for i in range(inputs):
            expected = scale * sum(b[o, k].item() * a[k, i].item() for k in range(rank))
            assert delta[o, i].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(sizes, sizes, sizes, sizes, st.integers(0, 999), st.floats(0.1, 4))
def test_expert_change_is_the_sum_over_that_experts_ranks(
    experts: int, rank: int, inputs: int, outputs: int, seed: int, scale: float
):
    a, b = _random(seed, experts * rank, inputs), _random(seed + 1, outputs, experts * rank)
    deltas = list(subject.expert_deltas(a, b, num_experts=experts, scale=scale))
    assert len(deltas) == experts
    for e, delta in enumerate(deltas):
        for i in range(inputs):
            for o in range(outputs):
                expected = scale * sum(a[e * rank + k, i].item() * b[o, k * experts + e].item() for k in range(rank))
                assert delta[i, o].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_expert_change_is_pefts(name: str):
    from peft import LoraConfig, get_peft_model

    from tests.tiny import SHAPE, make_model

    model = get_peft_model(make_model(), LoraConfig(r=3, lora_alpha=12, target_parameters=[f"mlp.experts.{name}"]))
    wrapper = model.base_model.model.model.layers[1].mlp.experts
    a, b = wrapper.lora_A["default"].weight.data, wrapper.lora_B["default"].weight.data
    a.copy_(_random(1, *a.shape))
    b.copy_(_random(2, *b.shape))
    ours = torch.stack(list(subject.expert_deltas(a, b, num_experts=SHAPE.num_experts, scale=4.0)))
    theirs = wrapper.get_delta_weight("default")
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-5, atol=1e-5)
    assert ours.abs().max() > 1


def test_half_precision_pairs_are_multiplied_in_float32():
    a, b = _random(3, 2, 5).bfloat16(), _random(4, 3, 2).bfloat16()
    delta = subject.linear_delta(a, b, scale=0.5)
    assert delta.dtype == torch.float32
    assert torch.equal(delta, (b.float() @ a.float()) * 0.5)


def test_pairs_that_do_not_fit_are_named():
    with pytest.raises(ShapeError, match=r"A is \(R, I\) = \(2, 3\), B is \(O, R\) = \(4, 5\)"):
        subject.linear_delta(torch.ones(2, 3), torch.ones(4, 5), scale=1.0)
    for a, b in (((4, 3), (5, 6)), ((3, 3), (5, 3))):
        with pytest.raises(ShapeError, match=r"does not fit 2 experts: A is \(E\*R, I\)"):
            list(subject.expert_deltas(torch.ones(a), torch.ones(b), num_experts=2, scale=1.0))
