"""LoRA on fused expert tensors without ever forming W + BA and without computing a gradient of W.

    y = sum over the K chosen experts of weight * expert(x),  each product  x W  as  x W + (x A) B

PEFT's ParamWrapper adds B A to all experts of a layer in each forward pass and computes their whole
gradient in each backward pass; here rows are sorted by expert, grouped GEMMs multiply them with the
frozen weights, and the rank-R detour is two thin products. Kept for the backward pass are the inputs
and the gate's argument; the output of `down` is not needed, since d loss / d weight = dg . g / weight
is known from the gradient that reaches the gate.

Ring: edge (live tensors).  Shapes: N tokens, K experts per token, S = N * K rows sorted by expert,
E experts, H hidden, F inner, R rank.
Source: Hu et al., arXiv:2106.09685; layout of the adapter: PEFT 0.21 ParamWrapper.get_delta_weight.
Trap: gpt-oss interleaves gate and up columns, [g0, u0, g1, u1, ...].
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import grouped_mm, pad

from tasks.errors import ShapeError
from tasks.gptoss.fused import fused

_ALIGNED = 8  # grouped_mm wants rows of 16 bytes
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """The frozen tensors of one layer, as transformers names them, and the constants of its gate."""

    gate_up_EHG: torch.Tensor  # G = 2 F, gate and up interleaved
    gate_up_bias_EG: torch.Tensor
    down_EFH: torch.Tensor
    down_bias_EH: torch.Tensor
    alpha: float
    limit: float


def lora_pair(a_RI: torch.Tensor, b_OR: torch.Tensor, num_experts: int, scale: float, dtype: torch.dtype) -> Pair:
    """Return PEFT's pair as A (E, I, R') and scale * B (E, R', O) for grouped_mm; R' is R rounded up to 8.

    Args:
        a_RI: (E*R, I), row e*R + k is rank k of expert e.
        b_OR: (O, R*E), column k*E + e is rank k of expert e.
    Differentiable: gradients reach `a_RI` and `b_OR`.
    """
    if a_RI.shape[0] != b_OR.shape[1] or a_RI.shape[0] % num_experts:
        raise ShapeError(
            f"LoRA pair does not fit {num_experts} experts: A is (E*R, I) = {tuple(a_RI.shape)}, "
            f"B is (O, R*E) = {tuple(b_OR.shape)}"
        )
    rank = a_RI.shape[0] // num_experts
    a_EIR = a_RI.view(num_experts, rank, -1).transpose(1, 2)
    b_ERO = (b_OR * scale).view(-1, rank, num_experts).permute(2, 1, 0)
    missing = -rank % _ALIGNED
    if missing:
        a_EIR, b_ERO = pad(a_EIR, (0, missing)), pad(b_ERO, (0, 0, 0, missing))
    return a_EIR.to(dtype).contiguous(), b_ERO.to(dtype).contiguous()


def run_experts(
    x_NH: torch.Tensor,
    index_NK: torch.Tensor,
    weight_NK: torch.Tensor,
    base: ExpertWeights,
    gate_up: Pair | None = None,
    down: Pair | None = None,
    *,
    recompute: bool = False,
) -> torch.Tensor:
    """Return the layer's output (N, H).

    Args:
        x_NH: input, in the dtype of the weights.
        index_NK: chosen experts.
        weight_NK: their routing weights.
        base: frozen weights; they get no gradient.
        gate_up: A, B of `gate_up_proj` as `lora_pair` makes them; None: no adapter there.
        down: the same of `down_proj`.
        recompute: make the gate's argument (4 F bytes a row in bf16, by far the most that is kept) again in the
            backward pass.
    Cost: forward 6 S H F multiply-adds, backward the same; 2 S H F more with `recompute`.
    """
    nothing: tuple[None, None] = (None, None)
    return _Experts.apply(x_NH, index_NK, weight_NK, base, *(gate_up or nothing), *(down or nothing), recompute)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # Any: torch's context
        x_NH: torch.Tensor,
        index_NK: torch.Tensor,
        weight_NK: torch.Tensor,
        base: ExpertWeights,
        a1: torch.Tensor | None,
        b1: torch.Tensor | None,
        a2: torch.Tensor | None,
        b2: torch.Tensor | None,
        recompute: bool,
    ) -> torch.Tensor:
        num_experts = len(base.gate_up_EHG)
        expert_S, order_S = index_NK.reshape(-1).sort(stable=True)
        ends_E = torch.searchsorted(expert_S, torch.arange(num_experts, device=expert_S.device), right=True).int()
        place_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
        token_S = order_S // index_NK.shape[1]

        pre_SG, u1 = _gate_argument(x_NH[token_S], ends_E, expert_S, base, a1, b1)
        g_SF = _gate(pre_SG, base.alpha, base.limit)
        out_SH = grouped_mm(g_SF, base.down_EFH, offs=ends_E)
        u2 = None if a2 is None else grouped_mm(g_SF, a2, offs=ends_E)
        detour_SH = None if u2 is None else grouped_mm(u2, b2, offs=ends_E)
        y_NH = _combine(out_SH, detour_SH, base.down_bias_EH, index_NK, weight_NK, place_S.view(index_NK.shape))

        ctx.base = base
        saved_pre = None if recompute else pre_SG
        ctx.save_for_backward(
            x_NH, weight_NK, expert_S, order_S, place_S, ends_E, saved_pre, u1, u2, a1, b1, a2, b2
        )
        return y_NH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NH, weight_NK, expert_S, order_S, place_S, ends_E, pre_SG, u1, u2, a1, b1, a2, b2 = ctx.saved_tensors
        base: ExpertWeights = ctx.base
        token_S = order_S // weight_NK.shape[1]
        w_S = weight_NK.reshape(-1)[order_S]
        x_SH = x_NH[token_S] if a1 is not None or pre_SG is None else None
        if pre_SG is None:
            pre_SG, u1 = _gate_argument(x_SH, ends_E, expert_S, base, a1, b1)

        dy_SH = grads[0][token_S]
        dg_SF = grouped_mm(dy_SH, base.down_EFH.transpose(1, 2), offs=ends_E)
        du2 = None if b2 is None else grouped_mm(dy_SH, b2.transpose(1, 2), offs=ends_E)
        detour_SF = None if du2 is None else grouped_mm(du2, a2.transpose(1, 2), offs=ends_E)
        g_SF, dpre_SG, dw_S = _gate_backward(pre_SG, dg_SF, detour_SF, w_S, base.alpha, base.limit)
        del pre_SG, dg_SF, detour_SF
        dw_S = _add_bias_part(dw_S, dy_SH, base.down_bias_EH, expert_S)
        da2 = db2 = da1 = db1 = detour_SH = None
        if du2 is not None:
            da2 = grouped_mm(g_SF.t(), _times(du2, w_S), offs=ends_E)
            db2 = grouped_mm(_times(u2, w_S).t(), dy_SH, offs=ends_E)
        del g_SF, dy_SH

        dx_SH = grouped_mm(dpre_SG, base.gate_up_EHG.transpose(1, 2), offs=ends_E)
        if b1 is not None:
            du1 = grouped_mm(dpre_SG, b1.transpose(1, 2), offs=ends_E)
            detour_SH = grouped_mm(du1, a1.transpose(1, 2), offs=ends_E)
            da1 = grouped_mm(x_SH.t(), du1, offs=ends_E)
            db1 = grouped_mm(u1.t(), dpre_SG, offs=ends_E)
        place_NK = place_S.view(weight_NK.shape)
        dx_NH = _gather_sum(dx_SH, detour_SH, place_NK)
        return dx_NH, None, dw_S[place_NK].to(weight_NK.dtype), None, da1, db1, da2, db2, None


def _gate_argument(
    x_SH: torch.Tensor,
    ends_E: torch.Tensor,
    expert_S: torch.Tensor,
    base: ExpertWeights,
    a1: torch.Tensor | None,
    b1: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return x W + (x A) B + bias (S, G) and x A."""
    h_SG = grouped_mm(x_SH, base.gate_up_EHG, offs=ends_E)
    if a1 is None or b1 is None:
        return _add_bias(h_SG, None, base.gate_up_bias_EG, expert_S), None
    u1 = grouped_mm(x_SH, a1, offs=ends_E)
    return _add_bias(h_SG, grouped_mm(u1, b1, offs=ends_E), base.gate_up_bias_EG, expert_S), u1


@fused
def _add_bias(
    h_SG: torch.Tensor, detour_SG: torch.Tensor | None, bias_EG: torch.Tensor, expert_S: torch.Tensor
) -> torch.Tensor:
    total_SG = h_SG.float() + bias_EG[expert_S].float()
    return (total_SG if detour_SG is None else total_SG + detour_SG.float()).to(h_SG.dtype)


@fused
def _gate(pre_SG: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    gate_SF = pre_SG[:, ::2].float().clamp(max=limit)
    up_SF = pre_SG[:, 1::2].float().clamp(-limit, limit)
    return ((up_SF + 1) * gate_SF * torch.sigmoid(gate_SF * alpha)).to(pre_SG.dtype)


@fused
def _gate_backward(
    pre_SG: torch.Tensor,
    dg_SF: torch.Tensor,
    detour_SF: torch.Tensor | None,
    w_S: torch.Tensor,
    alpha: float,
    limit: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gate's value again, the gradient of its argument, and g . dg, each row's share of d loss / d weight."""
    raw_gate, raw_up = pre_SG[:, ::2].float(), pre_SG[:, 1::2].float()
    gate_SF, up_SF = raw_gate.clamp(max=limit), raw_up.clamp(-limit, limit)
    sigmoid_SF = torch.sigmoid(gate_SF * alpha)
    glu_SF = gate_SF * sigmoid_SF
    g_SF = (up_SF + 1) * glu_SF
    total_SF = dg_SF.float() if detour_SF is None else dg_SF.float() + detour_SF.float()
    weighted_SF = total_SF * w_S[:, None].float()
    dgate_SF = weighted_SF * (up_SF + 1) * sigmoid_SF * (1 + alpha * gate_SF * (1 - sigmoid_SF))
    dup_SF = weighted_SF * glu_SF
    dgate_SF = torch.where(raw_gate <= limit, dgate_SF, 0.0)
    dup_SF = torch.where(raw_up.abs() <= limit, dup_SF, 0.0)
    dpre_SG = torch.stack((dgate_SF, dup_SF), dim=-1).flatten(1)
    return g_SF.to(pre_SG.dtype), dpre_SG.to(pre_SG.dtype), (g_SF * total_SF).sum(-1)


@fused
def _add_bias_part(
    dw_S: torch.Tensor, dy_SH: torch.Tensor, bias_EH: torch.Tensor, expert_S: torch.Tensor
) -> torch.Tensor:
    return dw_S + (dy_SH.float() * bias_EH[expert_S].float()).sum(-1)


@fused
def _times(u_SR: torch.Tensor, w_S: torch.Tensor) -> torch.Tensor:
    return (u_SR.float() * w_S[:, None].float()).to(u_SR.dtype)


@fused
def _combine(
    out_SH: torch.Tensor,
    detour_SH: torch.Tensor | None,
    bias_EH: torch.Tensor,
    index_NK: torch.Tensor,
    weight_NK: torch.Tensor,
    place_NK: torch.Tensor,
) -> torch.Tensor:
    """Add up what the experts of a token say; a gather and a sum, whose order does not depend on threads."""
    each_NKH = out_SH[place_NK].float() + bias_EH[index_NK].float()
    if detour_SH is not None:
        each_NKH = each_NKH + detour_SH[place_NK].float()
    return (each_NKH * weight_NK[:, :, None].float()).sum(1).to(out_SH.dtype)


@fused
def _gather_sum(rows_SH: torch.Tensor, detour_SH: torch.Tensor | None, place_NK: torch.Tensor) -> torch.Tensor:
    each_NKH = rows_SH[place_NK].float()
    if detour_SH is not None:
        each_NKH = each_NKH + detour_SH[place_NK].float()
    return each_NKH.sum(1).to(rows_SH.dtype)
