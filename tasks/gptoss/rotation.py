"""gpt-oss's rotary positions on packed rows, forward and back, one kernel each.

Ring: edge (live tensors).  Shapes: N tokens, A heads, G key heads, D head size (cos, sin: half of it),
O = (A + 2 G) D.
"""

import torch

from tasks.gptoss.fused import fused


@fused
def rotate_heads(x_NAD: torch.Tensor, cos_ND: torch.Tensor, sin_ND: torch.Tensor) -> torch.Tensor:
    """Return each head rotated."""
    return turn(x_NAD, cos_ND, sin_ND)


@fused
def rotate(qkv_NO: torch.Tensor, cos_ND: torch.Tensor, sin_ND: torch.Tensor, heads: int) -> torch.Tensor:
    """Return q and k rotated, v as it is, side by side (N, O). cos and sin hold half a head."""
    half = cos_ND.shape[-1]
    whole_NAD = qkv_NO.unflatten(1, (-1, 2 * half))
    keys = (whole_NAD.shape[1] - heads) // 2
    turned = turn(whole_NAD[:, : heads + keys], cos_ND, sin_ND)
    return torch.cat((turned, whole_NAD[:, heads + keys :]), dim=1).flatten(1)


@fused
def rotate_back(
    dq_NAD: torch.Tensor, dk_NGD: torch.Tensor, dv_NGD: torch.Tensor, cos_ND: torch.Tensor, sin_ND: torch.Tensor
) -> torch.Tensor:
    """Return the gradients before the rotation, side by side (N, O)."""
    back = [turn(part, cos_ND, -sin_ND) for part in (dq_NAD, dk_NGD)]
    return torch.cat((*back, dv_NGD), dim=1).flatten(1)


def turn(x_NAD: torch.Tensor, cos_ND: torch.Tensor, sin_ND: torch.Tensor) -> torch.Tensor:
    """Return the rotation as it is computed everywhere here: in float32, halves of a head as pairs."""
    first, second = x_NAD.float().chunk(2, dim=-1)
    cos, sin = cos_ND[:, None].float(), sin_ND[:, None].float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_NAD.dtype)
