"""gpt-oss's RMS norm, forward and backward in one kernel each, keeping no more than its input.

Ring: edge (live tensors).  Shapes: N tokens, H hidden.
"""

from typing import Any

import torch
from torch.nn.functional import pad

from tasks.gptoss.fused import fused, power_of_two

_WARPS = 8


def normed(x_NH: torch.Tensor, weight_H: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return gpt-oss's RMS norm of x, in x's dtype; the one here that autograd can follow."""
    if not x_NH.is_cuda or torch.is_grad_enabled():
        return normed_in_chain(x_NH, weight_H, epsilon)
    return _on_gpu(x_NH, weight_H, epsilon)[1]


@fused
def normed_in_chain(x_NH: torch.Tensor, weight_H: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return the same as autograd can follow it."""
    return _norm(x_NH, weight_H, epsilon)


def norm_wide(x_NH: torch.Tensor, weight_H: torch.Tensor, epsilon: float, num_more: int) -> torch.Tensor:
    """Return [norm(x) | 1 | 0] with `num_more` columns behind norm(x)."""
    if x_NH.is_cuda:
        return _on_gpu(x_NH, weight_H, epsilon, num_tail=num_more)[1]
    return torch.cat((_norm(x_NH, weight_H, epsilon), pad(x_NH.new_ones(len(x_NH), 1), (0, num_more - 1))), dim=1)


def add_norm(
    x_NH: torch.Tensor, more_NH: torch.Tensor, weight_H: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum in x's dtype, and the norm of the sum before it was rounded to that.

    Of the rounded one gradients in bfloat16 were 4 % farther from those in float32 (six small models on a CPU).
    """
    if x_NH.is_cuda:
        return _on_gpu(x_NH, weight_H, epsilon, more_NH=more_NH)
    wide_NH = x_NH.float() + more_NH.float()
    return wide_NH.to(x_NH.dtype), _norm(wide_NH, weight_H, epsilon).to(x_NH.dtype)


def norm_back(
    x_NH: torch.Tensor, weight_H: torch.Tensor, slope_NH: torch.Tensor, other_NH: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Return the norm's gradient for x, and another that reaches x, in one. The slope's rows may lie apart."""
    num_rows, width = x_NH.shape
    if x_NH.is_cuda:
        x_NH, slope_NH = x_NH.contiguous(), slope_NH if slope_NH.stride(1) == 1 else slope_NH.contiguous()
        out_NH = torch.empty_like(x_NH)
        _triton().norm_back[(num_rows,)](
            x_NH, weight_H, slope_NH, slope_NH.stride(0), other_NH.contiguous(), out_NH, width, epsilon,
            IS_ALIGNED=slope_NH.stride(0) % 8 == 0, BLOCK=power_of_two(width), num_warps=_WARPS,
        )  # fmt: skip
        return out_NH
    wide = x_NH.float()
    root_N1 = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    inner = slope_NH.float() * weight_H.float()
    slope = root_N1 * inner - wide * root_N1**3 * (wide * inner).mean(-1, keepdim=True)
    return (slope + other_NH.float()).to(x_NH.dtype)


def _norm(x_NH: torch.Tensor, weight_H: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide = x_NH.float()
    return (weight_H * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon))).to(x_NH.dtype)


def _on_gpu(
    x_NH: torch.Tensor,
    weight_H: torch.Tensor,
    epsilon: float,
    *,
    more_NH: torch.Tensor | None = None,
    num_tail: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum with `more_NH`, or x, and [its norm | 1 | 0]."""
    num_rows, width = x_NH.shape
    x_NH = x_NH.contiguous()
    sum_NH = x_NH if more_NH is None else torch.empty_like(x_NH)
    more_NH = x_NH if more_NH is None else more_NH.contiguous()
    out = x_NH.new_empty(num_rows, width + num_tail)
    _triton().norm_forward[(num_rows,)](
        x_NH, more_NH, weight_H, sum_NH, out, out.stride(0), width, epsilon, num_tail,
        HAS_MORE=more_NH is not x_NH, IS_ALIGNED=out.stride(0) % 8 == 0, TAIL=power_of_two(num_tail) if num_tail else 0,
        BLOCK=power_of_two(width), num_warps=_WARPS,
    )  # fmt: skip
    return sum_NH, out


def _triton() -> Any:  # Any: a module of Triton kernels, which exists with CUDA builds of torch only
    from tasks.gptoss import norm_triton

    return norm_triton
