"""The frozen-head loss equals the plain one, in value and gradient."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PhiConfig, Qwen2Config

from tasks.train.loss import FrozenHeadLoss, has_plain_head


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


SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
HEADS = {
    "qwen2": (Qwen2Config, {}, True),
    "granite scales": (GraniteConfig, {"logits_scaling": 4.0}, False),
    "cohere scales": (CohereConfig, {"logit_scale": 0.25}, False),
    "gemma2 caps": (Gemma2Config, {"final_logit_softcapping": 0.5, "head_dim": 8}, False),
    "phi adds": (PhiConfig, {}, False),
}


@pytest.mark.parametrize("family", HEADS)
def test_a_head_that_does_more_than_multiply_is_not_taken_for_a_plain_one(family: str):
    """Losses of logits without their scale, cap or bias would be another model's, without a word."""
    config, settings, is_plain = HEADS[family]
    torch.manual_seed(0)
    more = {"num_key_value_heads": 2, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(config(**SIZES, **more, **settings), attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    before = torch.get_rng_state()
    assert has_plain_head(model) == is_plain
    assert torch.equal(torch.get_rng_state(), before)
