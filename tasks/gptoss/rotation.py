"""gpt-oss's rotary positions on packed rows, forward and back, one kernel each on a GPU.

Ring: edge (live tensors).  Shapes: N tokens, A heads, G key heads, D head size (cos, sin: half of it),
O = (A + 2 G) D.
"""

from typing import Any

import torch

from tasks.gptoss.fused import fused

_BLOCK = 1024


@fused
def rotate_heads(x_NAD: torch.Tensor, cos_ND: torch.Tensor, sin_ND: torch.Tensor) -> torch.Tensor:
    """Return each head rotated."""
    return turn(x_NAD, cos_ND, sin_ND)


def rotate(qkv_NO: torch.Tensor, cos_ND: torch.Tensor, sin_ND: torch.Tensor, heads: int) -> torch.Tensor:
    """Return q and k rotated, v as it is, side by side (N, O): on a GPU where they lay. cos, sin: half a head."""
    half = cos_ND.shape[-1]
    keys = (qkv_NO.shape[1] // (2 * half) - heads) // 2
    if not qkv_NO.is_cuda:
        whole_NAD = qkv_NO.unflatten(1, (-1, 2 * half))
        turned = turn(whole_NAD[:, : heads + keys], cos_ND, sin_ND)
        return torch.cat((turned, whole_NAD[:, heads + keys :]), dim=1).flatten(1)
    num_pairs = (heads + keys) * half
    _triton().rotate[(len(qkv_NO), -(-num_pairs // _BLOCK))](
        qkv_NO, cos_ND.contiguous(), sin_ND.contiguous(), qkv_NO.stride(0), num_pairs, HALF=half, BLOCK=_BLOCK
    )
    return qkv_NO


def rotate_back(
    dq_NAD: torch.Tensor, dk_NGD: torch.Tensor, dv_NGD: torch.Tensor, cos_ND: torch.Tensor, sin_ND: torch.Tensor
) -> torch.Tensor:
    """Return the gradients before the rotation, side by side (N, O)."""
    if not dq_NAD.is_cuda:
        back = [turn(part, cos_ND, -sin_ND) for part in (dq_NAD, dk_NGD)]
        return torch.cat((*back, dv_NGD), dim=1).flatten(1)
    parts = [part if part.stride(2) == 1 else part.contiguous() for part in (dq_NAD, dk_NGD, dv_NGD)]
    half = cos_ND.shape[-1]
    q_pairs, k_pairs = (part.shape[1] * half for part in parts[:2])
    q_blocks, k_blocks = (-(-pairs // _BLOCK) for pairs in (q_pairs, k_pairs))
    out_NO = dq_NAD.new_empty(len(dq_NAD), 2 * (q_pairs + 2 * k_pairs))
    strides = [part.stride(place) for part in parts for place in (0, 1)]
    _triton().rotate_back[(len(out_NO), q_blocks + 2 * k_blocks)](
        *parts, out_NO, cos_ND.contiguous(), sin_ND.contiguous(), *strides, out_NO.stride(0), q_pairs, k_pairs,
        HALF=half, Q_BLOCKS=q_blocks, K_BLOCKS=k_blocks, BLOCK=_BLOCK,
    )  # fmt: skip
    return out_NO


def turn(x_NAD: torch.Tensor, cos_ND: torch.Tensor, sin_ND: torch.Tensor) -> torch.Tensor:
    """Return the rotation as it is computed everywhere here: in float32, halves of a head as pairs."""
    first, second = x_NAD.float().chunk(2, dim=-1)
    cos, sin = cos_ND[:, None].float(), sin_ND[:, None].float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_NAD.dtype)


def _triton() -> Any:  # Any: a module of Triton kernels, which exists with CUDA builds of torch only
    from tasks.gptoss import rotation_triton

    return rotation_triton
