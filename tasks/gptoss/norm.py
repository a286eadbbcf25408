"""gpt-oss's RMS norm, forward and backward in one kernel each, keeping no more than its input.

Ring: edge (live tensors).  Shapes: N tokens, H hidden.
"""

import torch
from torch.nn.functional import pad

from tasks.gptoss.fused import fused


@fused
def normed(x_NH: torch.Tensor, weight_H: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return gpt-oss's RMS norm of x, in x's dtype."""
    return _norm(x_NH, weight_H, epsilon)


@fused
def norm_wide(x_NH: torch.Tensor, weight_H: torch.Tensor, epsilon: float, num_more: int) -> torch.Tensor:
    """Return [norm(x) | 1 | 0] with `num_more` columns behind norm(x)."""
    return torch.cat((_norm(x_NH, weight_H, epsilon), pad(x_NH.new_ones(len(x_NH), 1), (0, num_more - 1))), dim=1)


@fused
def add_norm(
    x_NH: torch.Tensor, more_NH: torch.Tensor, weight_H: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum in x's dtype, and the norm of that."""
    sum_NH = x_NH + more_NH
    return sum_NH, _norm(sum_NH, weight_H, epsilon)


@fused
def norm_back(
    x_NH: torch.Tensor, weight_H: torch.Tensor, slope_NH: torch.Tensor, other_NH: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Return the norm's gradient for x, and another that reaches x, in one."""
    wide = x_NH.float()
    root_N1 = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    inner = slope_NH.float() * weight_H.float()
    slope = root_N1 * inner - wide * root_N1**3 * (wide * inner).mean(-1, keepdim=True)
    return (slope + other_NH.float()).to(x_NH.dtype)


def _norm(x_NH: torch.Tensor, weight_H: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide = x_NH.float()
    return (weight_H * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon))).to(x_NH.dtype)
