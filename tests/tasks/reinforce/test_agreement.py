"""Whether rollouts come from the model that learns, told from log-probabilities with the noise of engines in them."""

import pytest
import torch

from tasks.errors import TrainingError
from tasks.reinforce.agreement import Agreement, measure_agreement, require_adapter


def measure(share: float, *, change: float, noise: float, seed: int = 0, tokens: int = 400) -> Agreement:
    """An engine that runs `share` of an adapter, where each pass rounds by `noise`."""
    draw = torch.Generator().manual_seed(seed)

    def rounding() -> torch.Tensor:
        return noise * torch.randn(4, tokens // 4, generator=draw)

    base = -3 * torch.rand(4, tokens // 4, generator=draw)
    moved = change * torch.randn(4, tokens // 4, generator=draw)
    sampled = base + share * moved + rounding()
    return measure_agreement(sampled, base + moved + rounding(), base + rounding(), torch.ones(4, tokens // 4))


@pytest.mark.parametrize("noise", [1e-6, 0.02])
@pytest.mark.parametrize("seed", range(5))
def test_an_adapter_that_is_ignored_is_found_and_one_that_runs_is_left_alone(noise: float, seed: int):
    change = 5 * noise
    with pytest.raises(TrainingError, match=r"rollouts of step 3 ignore the adapter.* 400 tokens that vllm generated"):
        require_adapter(measure(0.0, change=change, noise=noise, seed=seed), 0.25, 3, "vllm")
    found = measure(1.0, change=change, noise=noise, seed=seed)
    assert found.share == pytest.approx(1, abs=0.2)
    require_adapter(found, 0.25, 3, "vllm")


@pytest.mark.parametrize("seed", range(20))
def test_before_anything_is_learnt_rounding_alone_ends_no_run(seed: int):
    require_adapter(measure(1.0, change=0.0, noise=0.02, seed=seed), 0.25, 1, "vllm")
    require_adapter(measure(1.0, change=0.004, noise=0.02, seed=seed), 0.25, 1, "vllm")


@pytest.mark.parametrize("flipped", [1, 2, 4])
@pytest.mark.parametrize("seed", range(10))
def test_tokens_whose_expert_flips_in_one_engine_alone_end_no_run(seed: int, flipped: int):
    """As a sound vLLM in bfloat16 had it: a share of 0.01 by two tokens of 384, its usual standard error 0.009."""
    draw = torch.Generator().manual_seed(seed)
    rounding, moved = 0.002 * torch.randn(3, 400, generator=draw), 0.005 * torch.randn(400, generator=draw)
    base = rounding[0] - 3
    policy, sampled = base + moved + rounding[1], base + moved + rounding[2]
    policy[torch.randperm(400, generator=draw)[:flipped]] += 1.5
    found = measure_agreement(sampled, policy, base, torch.ones(400))
    assert found.share == pytest.approx(0, abs=0.05) and found.num_telling == pytest.approx(flipped, rel=0.1)
    require_adapter(found, 0.25, 1, "vllm")


def test_half_an_adapter_shows_half():
    assert measure(0.5, change=0.5, noise=0.01).share == pytest.approx(0.5, abs=0.02)


def test_the_ratio_is_of_policy_to_rollout_and_tokens_without_a_number_are_left_out():
    sampled = torch.tensor([[-1.0, -2.0, float("nan"), -9.0]])
    policy, base = torch.tensor([[-1.0, -1.0, -1.0, -1.0]]), torch.full((1, 4), -2.0)
    found = measure_agreement(sampled, policy, base, torch.tensor([[1, 1, 1, 0]]))
    assert found.num_tokens == 2
    assert (found.ratio_min, found.ratio_max) == pytest.approx((1.0, 2.718281828))


def test_nothing_measured_says_nothing():
    empty = measure_agreement(*(torch.zeros(1, 4) for _ in range(3)), torch.zeros(1, 4))
    require_adapter(empty, 0.9, 1, "x")
