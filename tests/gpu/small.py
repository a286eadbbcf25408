"""The small gpt-oss of the GPU tests."""

from typing import Any

from transformers import GptOssConfig


def small_config(**changes: Any) -> GptOssConfig:
    """Three layers of every kind that gpt-oss has, in sizes that all kernels take."""
    shape = {
        "num_hidden_layers": 3,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 256,
        "head_dim": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "sliding_window": 128,
        "pad_token_id": 1,
        "eos_token_id": 0,
    }
    return GptOssConfig(**{**shape, **changes})
