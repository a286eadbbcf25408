"""Attention with sinks over the pages of continuous batching: each request over its own keys, without a mask.

transformers has one way for a model with sinks, which computes each query over the keys of all requests and masks
them. Here it is torch's flash attention over cumulative lengths, whose output a sink shrinks (tasks/gptoss/attention.py
says why that is right). It can be part of a CUDA graph: no size is asked of the GPU.

Ring: edge (live tensors).  Shapes: N tokens of all requests with padding, M keys of all, A heads, G key heads, D size.
"""

from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from tasks.gptoss.attention import shrink, sides
from tasks.gptoss.layout import MODEL_TYPE

_NAME = "pages_with_sinks"


def can_attend(model: Any) -> bool:  # Any: a PreTrainedModel, or PEFT's around one
    """Say whether this attention is for a model: gpt-oss on a GPU and in a type that flash attention takes."""
    weight = model.get_input_embeddings().weight
    if model.config.model_type != MODEL_TYPE or not weight.is_cuda:
        return False
    return weight.dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(weight.device) >= (8, 0)


def take_pages(model: Any) -> None:  # Any: as above
    """Switch a model to it, until its attention is set again."""
    AttentionInterface.register(_NAME, attend_over_pages)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    model.set_attn_implementation(_NAME)


def attend_over_pages(
    module: Any,  # Any: GptOssAttention
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: Any,  # Any: what transformers hands to an attention
) -> tuple[torch.Tensor, None]:
    """Write keys and values (1, G, N, D) into the pages and return the attention (1, N, A, D); 0 where N is padding.

    Args:
        module: whose sinks count, and which layer of the cache it is.
        query: (1, A, N, D), rotated.
        key: of the same tokens.
        value: of the same tokens.
        attention_mask: none is made.
        scaling: factor of the logits.
        sliding_window: tokens that a token sees, itself included.
        kwargs: the cache, where it reads and writes, cumulative lengths of queries and keys.
    """
    cache = kwargs.pop("cache")
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    q_NAD, k_MGD, v_MGD = (part[0].transpose(0, 1) for part in (query, key, value))
    ends_q, ends_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
    if q_NAD.is_cuda:
        longest = max(2, kwargs["max_length_q"]), kwargs["max_length_k"]  # of one query the kernel moves heads about
        out_NAD, lse_AN, *_ = torch.ops.aten._flash_attention_forward(
            q_NAD.contiguous(), k_MGD, v_MGD, ends_q, ends_k, *longest, 0.0, True, False, scale=scaling,
            **sides(sliding_window),
        )  # fmt: skip
    else:
        out_NAD, lse_AN = _one_by_one(q_NAD, k_MGD, v_MGD, ends_q, ends_k, scaling, sliding_window)
    out_NAD, _ = shrink(out_NAD, lse_AN, module.sinks)
    is_padding_N = torch.arange(len(q_NAD), device=ends_q.device) >= ends_q[-1]
    return out_NAD.masked_fill(is_padding_N[:, None, None], 0.0)[None], None


def _one_by_one(
    q_NAD: torch.Tensor,
    k_MGD: torch.Tensor,
    v_MGD: torch.Tensor,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain arithmetic, request by request: for tests on a CPU."""
    num_heads = q_NAD.shape[1]
    out_NAD, lse_AN = torch.zeros_like(q_NAD), q_NAD.new_zeros(num_heads, len(q_NAD))
    k_MAD, v_MAD = (part.repeat_interleave(num_heads // part.shape[1], 1) for part in (k_MGD, v_MGD))
    bounds = [list(pairwise(ends.tolist())) for ends in (ends_q, ends_k)]
    for (q0, q1), (k0, k1) in zip(*bounds, strict=True):
        back = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        seen = (back >= 0) & (back < (window or k1 + 1))
        logits = torch.einsum("nad,mad->anm", q_NAD[q0:q1], k_MAD[k0:k1]) * scale
        logits = logits.masked_fill(~seen, float("-inf"))
        lse_AN[:, q0:q1] = logits.logsumexp(-1)
        out_NAD[q0:q1] = torch.einsum("anm,mad->nad", logits.softmax(-1), v_MAD[k0:k1])
    return out_NAD, lse_AN
