"""The frozen-head loss equals the plain one, in value and gradient."""

import pytest
import torch

from tasks.train.loss import FrozenHeadLoss


@pytest.mark.parametrize("num_positions", [1, 127, 128, 300])
def test_it_equals_full_cross_entropy(num_positions: int):
    torch.manual_seed(num_positions)
    weight = torch.randn(500, 16)
    target = torch.randint(500, (num_positions,))
    hidden = (torch.randn(num_positions, 16) * 3).requires_grad_()
    other = hidden.detach().clone().requires_grad_()
    plain = torch.nn.functional.cross_entropy(other @ weight.T, target, reduction="sum")
    ours = FrozenHeadLoss.apply(hidden, weight, target)
    (ours * 0.5).backward()
    (plain * 0.5).backward()
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(hidden.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_no_learnt_position_is_a_loss_of_zero():
    hidden = torch.zeros(0, 16, requires_grad=True)
    loss = FrozenHeadLoss.apply(hidden, torch.randn(9, 16), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0
