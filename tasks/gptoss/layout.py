"""What is true of the gpt-oss family only: names, shapes, which layer slides, where experts sit.

    model.layers.{i}.mlp.experts.gate_up_proj        (E, I, 2F)  gate and up interleaved: g0, u0, g1, u1, ...
    model.layers.{i}.mlp.experts.down_proj           (E, F, I)
    model.layers.{i}.mlp.experts.{name}_blocks       (E, O, I/32, 16) uint8, MXFP4 of the transposed tensor
    model.layers.{i}.mlp.experts.{name}_scales       (E, O, I/32)     uint8

Ring: pure.  Shapes: E experts, I hidden size, F intermediate size, O out-features.
"""

import re
from typing import Any

from tasks.specs import GptOssShape

MODEL_TYPE = "gpt_oss"
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
_EXPERT = re.compile(r"^(?P<stem>.*\.mlp\.experts\.(?:gate_up_proj|down_proj))_(?P<part>blocks|scales)$")


def quantized_stem(name: str) -> tuple[str, str] | None:
    """Return (parameter name, 'blocks' or 'scales') of an MXFP4 tensor, or None of any other.

    >>> quantized_stem("model.layers.0.mlp.experts.down_proj_blocks")
    ('model.layers.0.mlp.experts.down_proj', 'blocks')
    >>> quantized_stem("model.layers.0.mlp.experts.down_proj_bias")
    """
    match = _EXPERT.match(name)
    return (match["stem"], match["part"]) if match else None


def parameter_name(name: str) -> str | None:
    """Return the parameter that a stored tensor belongs to; None for the scales beside its blocks."""
    found = quantized_stem(name)
    if found is None:
        return name
    return found[0] if found[1] == "blocks" else None


def config_values(shape: GptOssShape) -> dict[str, Any]:  # Any: arguments of many types
    """Return the arguments of transformers' GptOssConfig for a shape.

    YaRN stretches initial_context_tokens by rope_factor. With a factor of 1 it is plain rotation to the bit, and is
    told the whole context: vLLM makes its tables of original_max_position_embeddings * factor positions.
    """
    return {
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "sliding_window": shape.sliding_window,
        "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in range(shape.num_layers)],
        "max_position_embeddings": shape.context_tokens,
        "tie_word_embeddings": shape.tie_embeddings,
        "swiglu_limit": shape.swiglu_limit,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": shape.rope_theta,
            "factor": shape.rope_factor,
            "beta_fast": shape.rope_ntk_beta,
            "beta_slow": shape.rope_ntk_alpha,
            "truncate": False,
            "original_max_position_embeddings": (
                shape.initial_context_tokens if shape.rope_factor > 1 else shape.context_tokens
            ),
        },
    }


def parameter_shapes(shape: GptOssShape) -> dict[str, tuple[int, ...]]:
    """Return parameter name -> shape of the model that `config_values` describes, without building it.

    >>> tiny = dict(num_layers=1, hidden_size=8, intermediate_size=4, num_experts=2, experts_per_token=1,
    ...             num_attention_heads=2, num_key_value_heads=1, head_dim=4, vocab_size=10)
    >>> parameter_shapes(GptOssShape(**tiny))["model.layers.0.mlp.experts.gate_up_proj"]
    (2, 8, 8)
    """
    hidden, inner, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.q_proj.bias": (queries,),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.k_proj.bias": (keys,),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.v_proj.bias": (keys,),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.o_proj.bias": (hidden,),
        "self_attn.sinks": (shape.num_attention_heads,),
        "mlp.router.weight": (experts, hidden),
        "mlp.router.bias": (experts,),
        "mlp.experts.gate_up_proj": (experts, hidden, 2 * inner),
        "mlp.experts.gate_up_proj_bias": (experts, 2 * inner),
        "mlp.experts.down_proj": (experts, inner, hidden),
        "mlp.experts.down_proj_bias": (experts, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for index in range(shape.num_layers):
        shapes.update({f"model.layers.{index}.{name}": size for name, size in layer.items()})
    shapes["model.norm.weight"] = (hidden,)
    if not shape.tie_embeddings:
        shapes["lm_head.weight"] = (shape.vocab_size, hidden)
    return shapes
