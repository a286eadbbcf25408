"""What a model costs: arithmetic of a token, peaks of devices, and memory in words.

Source: Kaplan et al., arXiv:2001.08361, appendix B; MFU as in PaLM, arXiv:2204.02311, appendix B.

Ring: pure.  Units: bytes; floating point operations, an addition and a multiplication are two.
"""

import re
from collections.abc import Mapping
from typing import Any

HEAD_ROWS = 2048  # rows of logits that exist at once on a GPU (tasks/gptoss/head.py)
FROZEN_HEAD_ROWS = 512  # the same for a frozen head, whose gradient no block adds to
_PEAKS = (  # dense bf16 without sparsity, from the makers' data sheets; the first that fits counts
    ("GB200|B200", 2.25e15),
    ("GH200|H200|H100.*(SXM|HBM3|80GB)", 989e12),
    ("H100", 756e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10G|A10", 125e12),
    ("RTX 4090", 165e12),
    ("T4", 65e12),
)


def peak_flops(device: str) -> float:
    """Return a device's dense bf16 peak by its name; 0 when it is not known.

    >>> peak_flops("NVIDIA H200"), peak_flops("a processor")
    (989000000000000.0, 0.0)
    """
    return next((peak for pattern, peak in _PEAKS if re.search(rf"(?<![A-Z0-9])(?:{pattern})\b", device)), 0.0)


def say_needs(needs: Mapping[str, int]) -> str:
    """Write the parts, largest first.

    >>> say_needs({"weights": 41_800_000_000, "workspace": 1_100_000_000, "experts": 0})
    '42.9 GB (weights 41.8, workspace 1.1)'
    """
    parts = [f"{name} {size / 1e9:.1f}" for name, size in sorted(needs.items(), key=lambda part: -part[1]) if size]
    return f"{sum(needs.values()) / 1e9:.1f} GB ({', '.join(parts)})"


def whole_flops_per_token(config: Mapping[str, Any], document_tokens: float) -> float:  # Any: config.json
    """Return the operations that a token needs where every weight is trained: forward, and twice that backward.

    >>> shape = {"num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 10, "num_attention_heads": 2, "head_dim": 4,
    ...          "num_key_value_heads": 1, "intermediate_size": 4, "num_local_experts": 2, "num_experts_per_tok": 1}
    >>> whole_flops_per_token(shape, 1.0) == 6 * (8 * 10 + 2 * 8 * 4 * 3 + 8 * 2 + 3 * 8 * 4) + 3 * 4 * 2 * 4 * 0.5
    True
    """
    layers = range(config["num_hidden_layers"])
    matrices = config["hidden_size"] * config["vocab_size"] + len(layers) * layer_weights(config)
    return 6 * matrices + 3 * sum(attention_flops(config, layer, document_tokens) for layer in layers)


def layer_weights(config: Mapping[str, Any]) -> float:  # Any: config.json
    """Weights of one layer that a token meets."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    key_values = config.get("num_key_value_heads") or heads
    attention = 2 * hidden * head_dim * (heads + key_values)
    active = config.get("num_experts_per_tok") or config.get("experts_per_token") or 1
    router = hidden * (config.get("num_local_experts") or 0)
    return attention + active * 3 * hidden * config["intermediate_size"] + router


def attention_flops(config: Mapping[str, Any], layer: int, document_tokens: float) -> float:  # Any: config.json
    """Scores and their sum over values, forward, of one token that sees half of its document or the window."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kinds = config.get("layer_types") or []
    seen = document_tokens / 2
    if layer < len(kinds) and kinds[layer] == "sliding_attention":
        seen = min(seen, float(config.get("sliding_window") or seen))
    return 4 * heads * head_dim * seen
