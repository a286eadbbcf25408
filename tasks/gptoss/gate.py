"""The gated activation of gpt-oss's experts, forward and backward: one pass over memory each on a GPU.

    gate = min(h[0::2], limit);  up = clamp(h[1::2], -limit, limit);  g = (up + 1) * gate * sigmoid(alpha * gate)

The plain versions say what is computed and run on a CPU; on a GPU they would be three kernels that
read the widest tensor of the model again and again.

Ring: edge (live tensors).  Shapes: S rows, F inner, G = 2 F interleaved, X columns appended by the caller.
"""

from typing import Any

import torch

_BLOCK = 1024
NUM_PLAIN = 8  # columns behind g and rows behind a weight: a one and the bias, and zeros; rows of 16 bytes are wanted


def apply_gate(h_SG: torch.Tensor, rank: int, alpha: float, limit: float) -> torch.Tensor:
    """Return [g | `rank` columns as they come | 1 | 0] (S, F + rank + 8) in h's dtype."""
    num_rows, width = len(h_SG), h_SG.shape[1] // 2
    g = h_SG.new_empty(num_rows, width + rank + NUM_PLAIN)
    if not h_SG.is_cuda:
        gate, up, sigmoid = _parts(h_SG, alpha, limit)
        g[:, :width] = (up + 1) * gate * sigmoid
        g[:, width + rank :] = 0
        g[:, width + rank] = 1
    elif num_rows:
        kernel = _triton().gate_forward[(num_rows,)]
        kernel(h_SG, g, g.stride(0), alpha, limit, width, rank, BLOCK=_BLOCK, NUM_PLAIN=NUM_PLAIN)
    return g


def gate_backward(
    h_SG: torch.Tensor,
    dg: torch.Tensor,
    detour_SF: torch.Tensor | None,
    w_S: torch.Tensor,
    alpha: float,
    limit: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return g (S, F) again, d loss / d h (S, G) and the row sums of g * d (S, float32).

    On a GPU they take the place of the detour and of h.

    Args:
        h_SG: what the gate was applied to.
        dg: gradient of w-weighted g before the weight, (S, at least F): only the first F columns are read.
        detour_SF: added to it.
        w_S: each row's weight; d loss / d g = w * (dg + detour).
        alpha: of the gate.
        limit: of the gate.
    """
    num_rows, width = len(h_SG), h_SG.shape[1] // 2
    if h_SG.is_cuda:
        g, dh = h_SG.new_empty(num_rows, width) if detour_SF is None else detour_SF, h_SG
        dot = h_SG.new_empty(num_rows, dtype=torch.float32)
        if num_rows:
            other = dg if detour_SF is None else detour_SF
            _triton().gate_backward[(num_rows,)](
                h_SG, dg, dg.stride(0), other, w_S, g, dh, dot, alpha, limit, width,
                HAS_DETOUR=detour_SF is not None, BLOCK=_BLOCK,
            )  # fmt: skip
        return g, dh, dot
    total = dg[:, :width] if detour_SF is None else dg[:, :width] + detour_SF
    gate, up, sigmoid = _parts(h_SG, alpha, limit)
    g = (up + 1) * gate * sigmoid
    weighted = total * w_S[:, None]
    dgate = weighted * (up + 1) * sigmoid * (1 + alpha * gate * (1 - sigmoid))
    dup = weighted * gate * sigmoid
    dgate = torch.where(h_SG[:, ::2] <= limit, dgate, 0.0)
    dup = torch.where(h_SG[:, 1::2].abs() <= limit, dup, 0.0)
    return g.to(h_SG.dtype), torch.stack((dgate, dup), dim=-1).flatten(1).to(h_SG.dtype), (g * total).sum(-1).float()


def _parts(h_SG: torch.Tensor, alpha: float, limit: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gate, up = h_SG[:, ::2].clamp(max=limit), h_SG[:, 1::2].clamp(-limit, limit)
    return gate, up, torch.sigmoid(gate * alpha)


def _triton() -> Any:  # Any: a module of Triton kernels, which exists with CUDA builds of torch only
    from tasks.gptoss import gate_triton

    return gate_triton
