"""The arithmetic of a token, counted by hand for a small shape."""

import pytest

from tasks.costs import peak_flops
from tasks.targets import Target
from tasks.train.flops import flops_per_token

CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 10,
    "intermediate_size": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 3,
    "vocab_size": 100,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 6,
}
WEIGHTS = 2 * 10 * 3 * (4 + 2) + 2 * 3 * 10 * 7 + 10 * 8  # attention, two active experts, router: 860
HEAD = 2 * 2 * 10 * 100  # forward, and the gradient of its input
SCORES = (4 * 4 * 3 * 6, 4 * 4 * 3 * 20)  # a window of 6; half of a document of 40


def target(layer: int, shape: tuple[int, ...], trainable: int) -> Target:
    return Target(name=f"model.layers.{layer}.mlp.experts.down_proj", shape=shape, num_trainable=trainable)


def test_every_layer_adapted():
    targets = [target(layer, (8, 7, 10), 8 * 17) for layer in (0, 1)]
    forward = 2 * (2 * WEIGHTS) + sum(SCORES)
    backward = 2 * (2 * WEIGHTS) + 2 * sum(SCORES)
    lora = 6 * 2 * 17 * 2  # two of eight experts, in two layers
    assert flops_per_token(CONFIG, targets, 40) == HEAD + forward + backward + lora


def test_nothing_below_the_lowest_adapted_layer_runs_backward():
    both = flops_per_token(CONFIG, [target(0, (10, 12), 0)], 40)
    upper = flops_per_token(CONFIG, [target(1, (10, 12), 0)], 40)
    assert both - upper == 2 * WEIGHTS + 2 * SCORES[0]


def test_only_learnt_tokens_need_the_head():
    whole, half = (flops_per_token(CONFIG, [target(0, (10, 12), 0)], 40, share) for share in (1.0, 0.5))
    assert whole - half == HEAD / 2


def test_a_config_that_does_not_tell_gives_no_figure():
    assert flops_per_token({"n_layer": 3}, [], 40) == 0.0


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GB200", 2250),
        ("Tesla T4", 65),
        ("NVIDIA GeForce GTX 1080", 0),
    ],
)
def test_peaks(name: str, tera: float):
    assert peak_flops(name) == tera * 1e12
