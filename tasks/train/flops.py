"""How much arithmetic a token costs, and how much a device could do: their ratio is the MFU.

    config.json + targets -> flops_per_token()      device name -> peak_flops()

Counted is what the mathematics needs: of a mixture of experts only the active ones; of a frozen weight forward and the
gradient of its input, not the gradient of the weight; nothing below the lowest adapted layer runs backward;
recomputation (checkpointing) is not counted.
Source: Kaplan et al., arXiv:2001.08361, appendix B; MFU as in PaLM, arXiv:2204.02311, appendix B.

Ring: pure.  Units: floating point operations, an addition and a multiplication are two.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.costs import attention_flops, layer_weights
from tasks.targets import Target, first_trained_layer

_NEEDED = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "intermediate_size")


def flops_per_token(
    config: Mapping[str, Any],  # Any: config.json
    targets: Sequence[Target],
    document_tokens: float,
    learnt_share: float = 1.0,
) -> float:
    """Return the operations that training one token needs; 0 for a config that does not tell.

    Args:
        config: the base's config.json.
        targets: what gets an adapter (`find_targets`).
        document_tokens: mean length of the documents; a token sees half of its own on average.
        learnt_share: share of tokens whose loss is computed: only they need the head.
    """
    if not all(config.get(name) for name in _NEEDED):
        return 0.0
    num_layers = config["num_hidden_layers"]
    lowest = first_trained_layer(targets)
    matrices = 2 * layer_weights(config)
    total = learnt_share * 2 * 2 * config["hidden_size"] * config["vocab_size"]  # head: forward, gradient of its input
    for layer in range(num_layers):
        attention = attention_flops(config, layer, document_tokens)
        total += matrices + attention
        if layer >= lowest:
            total += matrices + 2 * attention
    active = config.get("num_experts_per_tok") or config.get("experts_per_token") or 1
    experts = config.get("num_local_experts") or 1
    for target in targets:
        share = active / experts if len(target.shape) == 3 else 1.0
        total += 6 * target.num_trainable * share
    return total
