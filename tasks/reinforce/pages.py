"""Attention over the pages of continuous batching: each request over its own keys, without a mask.

transformers' own ways, but for flash attention of a package beside it, compute each query over the keys of all requests
and mask them. Here it is torch's flash attention over cumulative lengths, whose output a sink shrinks
(tasks/gptoss/attention.py says why that is right); it can be part of a CUDA graph: no size is asked of the GPU. Where
there is none, on a CPU or in float32, it is plain arithmetic, request by request.

Ring: edge (live tensors).  Shapes: N tokens of all requests with padding, M keys of all, A heads, G key heads,
P = A / G, D size; of R requests that have one query each, K keys of the longest.
"""

from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from tasks.errors import RolloutError
from tasks.gptoss.attention import shrink, sides

_NAME = "pages"
_HALVES = (torch.bfloat16, torch.float16)
_MORE = ("softcap", "position_bias", "indices", "block_indices", "sinks")  # what some models hand to their attention


def has_flash(model: Any) -> bool:  # Any: a PreTrainedModel, or PEFT's around one
    """Say whether torch's flash attention takes a model: in half precision, on a GPU that has it, with such heads."""
    weight, config = model.get_input_embeddings().weight, model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return weight.is_cuda and weight.dtype in _HALVES and _takes(weight.device, size)


def _takes(device: torch.device, head_dim: int) -> bool:
    return head_dim % 8 == 0 and head_dim <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)


def take_pages(model: Any) -> None:  # Any: as above
    """Switch a model to it, until its attention is set again."""
    AttentionInterface.register(_NAME, attend_over_pages)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    model.set_attn_implementation(_NAME)


def attend_over_pages(
    module: Any,  # Any: the attention of a transformers model
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,  # Any: what transformers hands to an attention
) -> tuple[torch.Tensor, None]:
    """Write keys and values (1, G, N, D) into the pages and return the attention (1, N, A, D); 0 where N is padding.

    Args:
        module: which layer of the cache it is.
        query: (1, A, N, D), rotated.
        key: of the same tokens.
        value: of the same tokens.
        attention_mask: None; one is of a model's own making.
        scaling: factor of the logits; None: 1 / sqrt(D).
        sliding_window: tokens that a token sees, itself included.
        s_aux: sinks (A), of models that have them.
        kwargs: the cache, where it reads and writes, cumulative lengths of queries and keys.
    Raises: RolloutError for what else a model wants of its attention.
    """
    _require_known(module, attention_mask, sliding_window, kwargs)
    cache = kwargs.pop("cache")
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    q_NAD, k_MGD, v_MGD = (part[0].transpose(0, 1) for part in (query, key, value))
    ends_q, ends_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
    scale = q_NAD.shape[-1] ** -0.5 if scaling is None else scaling
    if q_NAD.is_cuda and q_NAD.dtype in _HALVES and _takes(q_NAD.device, q_NAD.shape[-1]):
        longest = max(2, kwargs["max_length_q"]), kwargs["max_length_k"]  # of one query the kernel moves heads about
        out_NAD, lse_AN, *_ = torch.ops.aten._flash_attention_forward(
            q_NAD.contiguous(), k_MGD, v_MGD, ends_q, ends_k, *longest, 0.0, True, False, scale=scale,
            **sides(sliding_window),
        )  # fmt: skip
    else:
        out_NAD, lse_AN = _plainly(q_NAD, k_MGD, v_MGD, ends_q.tolist(), ends_k.tolist(), scale, sliding_window)
    if s_aux is not None:
        out_NAD, _ = shrink(out_NAD, lse_AN, s_aux)
    is_padding_N = torch.arange(len(q_NAD), device=ends_q.device) >= ends_q[-1]
    return out_NAD.masked_fill(is_padding_N[:, None, None], 0.0)[None], None


def _require_known(
    module: Any, mask: torch.Tensor | None, window: int | None, kwargs: dict[str, Any]
) -> None:  # Any: as above
    """Raise RolloutError for what would be left out without a word: `generate` computes it. Keys are of a whole pass.

    A layer that comes twice in a pass, or whose window the cache takes for another, finds other keys than its own.
    """
    unknown = [name for name in _MORE if kwargs.get(name) is not None]
    if mask is not None:
        unknown.append("a mask of its own")
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        unknown.append("is_causal=False")
    if (cache := kwargs.get("cache")) is None:
        unknown.append("no cache")
    elif not unknown:
        layers, layer = cache.layer_to_allocator, module.layer_idx
        last, cache.last_layer = getattr(cache, "last_layer", len(layers) - 1), layer
        if layer != (last + 1) % len(layers):
            unknown.append(f"keys of layer {layer} behind those of {last}, of {len(layers)} layers")
        elif (kept := getattr(layers[layer], "sliding_window", None)) != window:
            unknown.append(f"a window of {window} where {kept} are kept (None: all)")
    if unknown:
        raise RolloutError(
            f"{type(module).__name__} wants {unknown[0]} of its attention, which has no pages: use "
            "rollouts='transformers'"
        )


def _plainly(
    q_NAD: torch.Tensor,
    k_MGD: torch.Tensor,
    v_MGD: torch.Tensor,
    ends_q: list[int],
    ends_k: list[int],
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and log-sum-exp: of all requests with one query at once, of the others one by one."""
    out_NAD = torch.zeros_like(q_NAD)
    lse_AN = q_NAD.new_zeros(q_NAD.shape[1], len(q_NAD), dtype=torch.float32)
    requests = list(zip(pairwise(ends_q), pairwise(ends_k), strict=True))
    decoding = [(q0, k0, k1) for (q0, q1), (k0, k1) in requests if q1 - q0 == 1]
    if decoding:
        q0_R, k0_R, k1_R = torch.tensor(decoding, device=q_NAD.device).unbind(1)
        count_R = k1_R - k0_R
        place_K = torch.arange(max(k1 - k0 for _, k0, k1 in decoding), device=q_NAD.device)
        keys_RK = (k0_R[:, None] + place_K).clamp(max=len(k_MGD) - 1)
        back_RK = count_R[:, None] - 1 - place_K
        out_RNAD, lse_RAN = _attend(q_NAD[q0_R, None], k_MGD[keys_RK], v_MGD[keys_RK], back_RK[:, None], scale, window)
        out_NAD[q0_R], lse_AN[:, q0_R] = out_RNAD[:, 0], lse_RAN[:, :, 0].t()
    for (q0, q1), (k0, k1) in requests:
        if q1 - q0 > 1:
            places = torch.arange(k1 - k0, device=q_NAD.device)
            back_1NK = (places[k1 - k0 - (q1 - q0) :, None] - places)[None]
            out_1NAD, lse_1AN = _attend(
                q_NAD[None, q0:q1], k_MGD[None, k0:k1], v_MGD[None, k0:k1], back_1NK, scale, window
            )
            out_NAD[q0:q1], lse_AN[:, q0:q1] = out_1NAD[0], lse_1AN[0]
    return out_NAD, lse_AN


def _attend(
    q_RNAD: torch.Tensor,
    k_RKGD: torch.Tensor,
    v_RKGD: torch.Tensor,
    back_RNK: torch.Tensor,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output (R, N, A, D) and log-sum-exp (R, A, N); `back` says how far a key lies behind its query."""
    q_RNGPD = q_RNAD.unflatten(2, (k_RKGD.shape[2], -1))
    is_hidden = (back_RNK < 0) | (back_RNK >= (window or back_RNK.shape[-1]))
    logits_RGPNK = torch.einsum("rngpd,rkgd->rgpnk", q_RNGPD, k_RKGD).float() * scale
    logits_RGPNK = logits_RGPNK.masked_fill(is_hidden[:, None, None], float("-inf"))
    lse_RGPN = logits_RGPNK.logsumexp(-1)
    share_RGPNK = (logits_RGPNK - lse_RGPN[..., None]).exp().to(v_RKGD.dtype)
    return torch.einsum("rgpnk,rkgd->rngpd", share_RGPNK, v_RKGD).flatten(2, 3), lse_RGPN.flatten(1, 2)
