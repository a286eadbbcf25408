"""Experts that are trained themselves: value and every gradient are those of looking each row's expert up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.gptoss.trained_experts import run_trained_experts
from tests.tasks.gptoss.test_experts import ALPHA, LIMIT, draw, plain


class Holder(torch.nn.Module):
    alpha, limit = ALPHA, LIMIT

    def __init__(self, num: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(draw(num, hidden, 2 * inner) / 4)
        self.gate_up_proj_bias = torch.nn.Parameter(draw(num, 2 * inner))
        self.down_proj = torch.nn.Parameter(draw(num, inner, hidden) / 4)
        self.down_proj_bias = torch.nn.Parameter(draw(num, hidden))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 30),
    num=st.integers(1, 6),
    recompute=st.booleans(),
)
def test_value_and_all_gradients_are_the_plain_ones(seed, tokens, num, recompute):
    torch.manual_seed(seed)
    hidden, inner, chosen = 16, 24, min(2, num)
    module = Holder(num, hidden, inner)
    index = torch.stack([torch.randperm(num)[:chosen] for _ in range(tokens)])
    x = (draw(tokens, hidden) * 3).requires_grad_()
    weight = draw(tokens, chosen).softmax(-1).requires_grad_()
    leaves = [x, weight, *module.parameters()]
    dy = draw(tokens, hidden)
    names = {"gate_up": "gate_up_proj", "down": "down_proj"}
    tensors = {name: getattr(module, full) for name, full in names.items()}
    tensors |= {f"{name}_bias": getattr(module, f"{full}_bias") for name, full in names.items()}
    expected = plain(x, index, weight, tensors, {}, 1.0)
    expected_grads = torch.autograd.grad(expected, leaves, dy, allow_unused=True)
    ours = run_trained_experts(module, x, index, weight, recompute=recompute)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(ours, leaves, dy), expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_an_expert_that_got_no_token_has_a_gradient_of_zero():
    module = Holder(3, 16, 24)
    x = draw(4, 16)
    index, weight = torch.tensor([[0], [2], [0], [2]]), torch.ones(4, 1)
    run_trained_experts(module, x, index, weight).sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert not parameter.grad[1].any()
        assert parameter.grad[0].any()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_whole_model_learns_what_stock_experts_learn(recompute):
    from tasks.gptoss.forward import find_decoder
    from tasks.gptoss.trained_experts import train_experts
    from tests.tiny import make_model

    torch.manual_seed(0)
    ids = torch.randint(0, 262, (2, 24))
    stock, ours = make_model(), make_model()
    train_experts(find_decoder(ours), recompute=recompute)
    losses = []
    for model in (stock, ours):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for (name, expected), mine in zip(stock.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
