"""Attention with sinks over packed documents, on torch's own flash attention, right in forward and backward.

A sink is one more logit per head that takes probability and gives no value. With lse the log-sum-exp
without it, the output only shrinks by exp(lse - lse'), lse' = logaddexp(lse, sink). Flash attention's
backward pass computes p = exp(s - lse) and ds = p (dp - dout . out) from the out and lse that it is
given: given out' and lse', its dq, dk and dv are those with the sink. No kernel of our own is needed,
and no T x T matrix, mask or recompilation: documents are cumulative lengths.

Ring: edge (live tensors).  Shapes: N tokens of all documents, A heads, G key heads, D head size.
Trap: gpt-oss's window is exactly W tokens with the current one; flash attention's is W - 1 before it.
"""

from dataclasses import dataclass
from typing import Any

import torch

from tasks.gptoss.fused import fused

_LONG = 2048  # tokens from which on a document's attention is worth another library


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """Where packed documents begin: `ends` int32, [0, n1, n1 + n2, ...]; `longest` in tokens."""

    ends: torch.Tensor
    longest: int
    is_rectangle: bool  # all are as long as the longest


def told_documents(ends: torch.Tensor, longest: int, num_tokens: int) -> Documents:
    """Return documents of which all is known already, so that no GPU must be waited for."""
    return Documents(ends=ends, longest=longest, is_rectangle=longest * (len(ends) - 1) == num_tokens)


def find_documents(position_ids: torch.Tensor) -> Documents:
    """Return the documents of a flattened batch: one begins wherever a position is 0.

    >>> find_documents(torch.tensor([[0, 1, 2, 0, 1]]))
    Documents(ends=tensor([0, 3, 5], dtype=torch.int32), longest=3, is_rectangle=False)
    """
    positions_N = position_ids.reshape(-1)
    if positions_N[0] != 0:
        raise ValueError(f"a batch begins with position {int(positions_N[0])}, expected 0: documents must not be cut")
    starts = (positions_N == 0).nonzero()[:, 0].int()
    total = torch.tensor([len(positions_N)], dtype=torch.int32, device=starts.device)
    ends = torch.cat([starts, total])
    return told_documents(ends, int(ends.diff().max()), len(positions_N))


def attend_with_sinks(
    q_NAD: torch.Tensor,
    k_NGD: torch.Tensor,
    v_NGD: torch.Tensor,
    sinks_A: torch.Tensor,
    documents: Documents,
    *,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Return causal attention (N, A, D) within each document.

    Args:
        q_NAD: rotated queries.
        k_NGD: rotated keys.
        v_NGD: values.
        sinks_A: one logit per head.
        documents: where each document begins.
        window: tokens that a token sees, itself included; None: all before it.
        scale: factor of the logits.
    On a GPU bf16 or fp16 (compute capability 8.0 or newer); on a CPU float32, for tests: it builds a mask.
    """
    return _SinkAttention.apply(q_NAD, k_NGD, v_NGD, sinks_A, documents, window, scale)


def forward_of(
    q_NAD: torch.Tensor,
    k_NGD: torch.Tensor,
    v_NGD: torch.Tensor,
    sinks_A: torch.Tensor,
    documents: Documents,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, Any, tuple[torch.Tensor, ...]]:
    """Return the attention's output and log-sum-exp, the engine whose `backward` takes them, and its state."""
    engine = _choose_engine(q_NAD, documents, window)
    out_NAD, lse_AN, state = engine.forward(q_NAD, k_NGD, v_NGD, documents, window, scale)
    return *shrink(out_NAD, lse_AN, sinks_A), engine, state


class _SinkAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # Any: torch's context
        q_NAD: torch.Tensor,
        k_NGD: torch.Tensor,
        v_NGD: torch.Tensor,
        sinks_A: torch.Tensor,
        documents: Documents,
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        out_NAD, lse_AN, engine, state = forward_of(q_NAD, k_NGD, v_NGD, sinks_A, documents, window, scale)
        ctx.save_for_backward(q_NAD, k_NGD, v_NGD, sinks_A, out_NAD, lse_AN, *state)
        ctx.rest = (engine, documents, window, scale)
        return out_NAD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_NAD, k_NGD, v_NGD, sinks_A, out_NAD, lse_AN, *state = ctx.saved_tensors
        engine, documents, window, scale = ctx.rest
        dout_NAD = grads[0].contiguous()
        dq, dk, dv = engine.backward(dout_NAD, q_NAD, k_NGD, v_NGD, out_NAD, lse_AN, state, documents, window, scale)
        dsinks_A = None
        if ctx.needs_input_grad[3]:
            share_NA = (sinks_A.float() - lse_AN.t()).exp()
            dsinks_A = -(share_NA * (dout_NAD.float() * out_NAD.float()).sum(-1)).sum(0).to(sinks_A.dtype)
        return dq, dk, dv, dsinks_A, None, None, None


@fused
def shrink(out_NAD: torch.Tensor, lse_AN: torch.Tensor, sinks_A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an attention's output and log-sum-exp with the sinks, from those without."""
    with_sink_AN = torch.logaddexp(lse_AN, sinks_A.float()[:, None])
    share_NA1 = (lse_AN - with_sink_AN).exp().t()[:, :, None]
    return (out_NAD.float() * share_NA1).to(out_NAD.dtype), with_sink_AN


def _choose_engine(q_NAD: torch.Tensor, documents: Documents, window: int | None) -> Any:  # Any: one of the three below
    if not q_NAD.is_cuda:
        return _OnCpu
    is_long = documents.is_rectangle and documents.longest >= _LONG and window is None
    is_hopper = torch.cuda.get_device_capability(q_NAD.device)[0] == 9
    if is_long and is_hopper and not torch.are_deterministic_algorithms_enabled():
        return _OnGpuWhole
    return _OnGpu


class _OnGpuWhole:
    """cuDNN's attention, for rows that are one long document each: it takes two thirds of FlashAttention 2's time.

    Not for packed rows: it plans anew for each list of lengths, which costs more than it saves.
    """

    @staticmethod
    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, window: int | None, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        del window
        longest = documents.longest
        out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._cudnn_attention_forward(
            *(_as_rows(part, longest) for part in (q, k, v)),
            *(None, None, None, longest, longest, True, 0.0, True, False),
            scale=scale,
        )
        return out.transpose(1, 2).flatten(0, 1), lse[..., 0].transpose(0, 1).flatten(1), (seed, offset)

    @staticmethod
    def backward(
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        state: list[torch.Tensor],
        documents: Documents,
        window: int | None,
        scale: float,
    ) -> tuple[torch.Tensor, ...]:
        del window
        longest = documents.longest
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(_as_rows(part, longest) for part in (dout, q, k, v, out)),
            lse.unflatten(1, (-1, longest)).transpose(0, 1)[..., None].contiguous(),
            *state,
            *(None, None, None, longest, longest, 0.0, True),
            scale=scale,
        )
        return tuple(grad.transpose(1, 2).flatten(0, 1) for grad in grads)


def _as_rows(part_NAD: torch.Tensor, longest: int) -> torch.Tensor:
    """Return the view (documents, heads, tokens, D)."""
    return part_NAD.unflatten(0, (-1, longest)).transpose(1, 2)


class _OnGpu:
    """torch's FlashAttention 2 over cumulative lengths; deterministic when torch is told to be."""

    @staticmethod
    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, window: int | None, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        ends, longest = documents.ends, documents.longest
        out, lse, seed, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, ends, ends, longest, longest, 0.0, True, False, scale=scale, **sides(window)
        )
        return out, lse, (seed, unused)

    @staticmethod
    def backward(
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        state: list[torch.Tensor],
        documents: Documents,
        window: int | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ends, longest = documents.ends, documents.longest
        return torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, ends, ends, longest, longest, 0.0, True, *state, scale=scale, **sides(window)
        )


def sides(window: int | None) -> dict[str, int]:
    """Return how flash attention is told a window of so many tokens, the current one included."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


class _OnCpu:
    """The same by torch's CPU flash attention with a mask."""

    @staticmethod
    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, window: int | None, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        mask = _mask(documents, window, q.dtype)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_heads_first(q, k, v), 0.0, False, attn_mask=mask, scale=scale
        )
        return out[0].transpose(0, 1), lse[0], (mask,)

    @staticmethod
    def backward(
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        state: list[torch.Tensor],
        documents: Documents,
        window: int | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        del documents, window
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout.transpose(0, 1)[None],
            *_heads_first(q, k, v),
            out.transpose(0, 1)[None],
            lse[None],
            0.0,
            False,
            attn_mask=state[0],
            scale=scale,
        )
        groups = (k.shape[1], -1, *dk.shape[2:])
        dk_G, dv_G = (grad[0].view(groups).sum(1) for grad in (dk, dv))
        return dq[0].transpose(0, 1), dk_G.transpose(0, 1), dv_G.transpose(0, 1)


def _heads_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    copies = q.shape[1] // k.shape[1]
    return [part.transpose(0, 1)[None] for part in (q, *(kv.repeat_interleave(copies, dim=1) for kv in (k, v)))]


def _mask(documents: Documents, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    place_N = torch.arange(int(documents.ends[-1]))
    document_N = torch.searchsorted(documents.ends.long(), place_N, right=True)
    back_NN = place_N[:, None] - place_N[None, :]
    seen = (document_N[:, None] == document_N[None, :]) & (back_NN >= 0)
    if window is not None:
        seen &= back_NN < window
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf"))[None, None]
