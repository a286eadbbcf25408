"""LoRA on fused expert tensors without ever forming W + BA and without computing a gradient of W.

    y = sum over the K chosen experts of weight * down(gate(gate_up(x)))

PEFT's ParamWrapper adds B A to all experts of a layer in each forward pass and computes their whole
gradient in each backward pass. Here rows are sorted by expert and grouped GEMMs multiply them with
the frozen weights; the adapter's second half and the bias ride along as more rows of the weight:

    [x | x A | 1] @ [W; B; bias] = x W + (x A) B + bias          one GEMM, one rounding
    dy @ [W; B; bias]^T = [dy W^T | d(x A) | dy . bias]          and its gradients

What touches the layer's input or output only, where a token has one row and not K, is a dense GEMM with
the halves of all experts at once: their E R columns cost less arithmetic than K copies of a row cost memory.

Kept for the backward pass are the input (or what it is made from), the gate's argument and x A. The output of
`down` is not: d loss / d weight is the gradient that reaches the gate, times the gate.

Ring: edge (live tensors).  Shapes: N tokens, K experts per token, S = N * K rows sorted by expert,
E experts, H hidden, F inner, I in, O out, R rank, P = E * R expert-major, Q = R * E rank-major,
X = R rounded up to 8, and 8, rows appended (8 without adapter).
Source: Hu et al., arXiv:2106.09685; layout of the adapter: PEFT 0.21 ParamWrapper.get_delta_weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import grouped_mm

from tasks.gptoss.gate import apply_gate, gate_backward
from tasks.gptoss.product import Era, Product, by_rank, rank_major
from tasks.gptoss.rows import (
    by_expert,
    combine,
    down_slopes,
    gather_sum,
    sort_rows,
    spend,
    spread,
    spread_again,
    spread_plain,
    spread_with,
    weight_slope,
)
from tasks.gptoss.shelf import Shelf, Ticket


def run_experts(
    x_NH: torch.Tensor,
    index_NK: torch.Tensor,
    weight_NK: torch.Tensor,
    gate_up: Product,
    down: Product,
    *,
    alpha: float,
    limit: float,
    recompute: bool = False,
    residual_NH: torch.Tensor | None = None,
    remake: Callable[[torch.Tensor], torch.Tensor] | None = None,
    era: Era | None = None,
    place: "Place | None" = None,
) -> torch.Tensor:
    """Return the layer's output (N, H); gradients reach the input, the routing weights, the residual and the pairs.

    Args:
        x_NH: input, in the dtype of the weights.
        index_NK: chosen experts, K different ones a token.
        weight_NK: their routing weights.
        gate_up: H -> 2 F, gate and up columns interleaved.
        down: F -> H.
        alpha: of the gate.
        limit: of the gate.
        recompute: make the gate's argument (4 F bytes a row in bf16, by far the most that is kept) again in the
            backward pass.
        residual_NH: is added to the output.
        remake: makes the input from the residual once more, so that it need not be kept.
        era: whoever says when adapters change; None: they may, before each pass.
        place: lets the gate's argument, or that of the layer below, rest in the host's memory meanwhile.
    Cost: forward 3 S H F multiply-adds, backward the same; 2 S H F more with `recompute`. One backward pass only: it
    writes over what was kept.
    """
    halves = [
        half for each in (gate_up, down) for half in ((each.pair.a_PI, each.pair.b_OQ) if each.pair else (None,) * 2)
    ]
    learns = torch.is_grad_enabled() and any(
        each is not None and each.requires_grad for each in (x_NH, weight_NK, residual_NH, *halves)
    )
    call = _Call(
        gate_up=gate_up,
        down=down,
        alpha=alpha,
        limit=limit,
        recompute=recompute,
        remake=remake,
        era=era and era.name,
        place=place if learns else None,
    )
    return _Experts.apply(x_NH, index_NK, weight_NK, residual_NH, *halves, call)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which layer this is to the shelf, and whether its own gate's argument rests there."""

    shelf: Shelf
    layer: int
    is_shelved: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """What a pass needs beside tensors; outside of an era itself the name under which the adapter's halves are made."""

    gate_up: Product
    down: Product
    alpha: float
    limit: float
    recompute: bool
    remake: Callable[[torch.Tensor], torch.Tensor] | None
    era: object
    place: Place | None

    @property
    def name(self) -> object:
        """For how long the adapters are what they are."""
        return self.era or self


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # Any: torch's context
        x_NH: torch.Tensor,
        index_NK: torch.Tensor,
        weight_NK: torch.Tensor,
        residual_NH: torch.Tensor | None,
        a1_PH: torch.Tensor | None,
        b1_GQ: torch.Tensor | None,
        a2_PF: torch.Tensor | None,
        b2_HQ: torch.Tensor | None,
        call: _Call,
    ) -> torch.Tensor:
        del b1_GQ, b2_HQ  # Product.extend reads them
        gate_up, down, place = call.gate_up, call.down, call.place
        ctx.below = ctx.ticket = None
        if place is not None:
            place.shelf.settle(place.layer)
            ctx.below = place.shelf.below(place.layer)
        order_S, place_NK, ends_E = sort_rows(index_NK, len(gate_up.w_EIO))
        a1_PH, a2_PF = gate_up.first_half(call.name), down.first_half(call.name)
        u1_SR = u2_SR = a2_ERF = None
        if gate_up.pair is None or a1_PH is None:
            x_SX = spread(x_NH, order_S, index_NK.shape[1])
        else:
            x_SX, u1_SR = spread_with(x_NH, x_NH @ a1_PH.t(), index_NK, order_S, gate_up.pair.rank, gate_up.rank)
        h_SG = grouped_mm(x_SX, gate_up.extend(call.name), offs=ends_E)
        del x_SX
        if place is not None and place.is_shelved:
            ctx.ticket = place.shelf.put(place.layer, h_SG)
        g_SX = apply_gate(h_SG, down.rank, call.alpha, call.limit)
        if down.pair is not None and a2_PF is not None:
            num_inner, a2_ERF = a2_PF.shape[1], by_rank(a2_PF, down.pair.rank)
            u2_SR = grouped_mm(g_SX[:, :num_inner], a2_ERF.transpose(1, 2), offs=ends_E)
            g_SX[:, num_inner : num_inner + down.rank] = u2_SR
        out_SH = grouped_mm(g_SX, down.extend(call.name), offs=ends_E)
        ctx.call = call
        kept_x = x_NH if call.remake is None else residual_NH
        kept_h = None if call.recompute or ctx.ticket else h_SG
        ctx.save_for_backward(
            kept_x, index_NK, weight_NK, order_S, place_NK, ends_E, kept_h, u1_SR, u2_SR, a1_PH, a2_ERF
        )
        return combine(out_SH, weight_NK, place_NK, residual_NH)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        spend(ctx)
        x_NH, index_NK, weight_NK, order_S, place_NK, ends_E, h_SG, u1_SR, u2_SR, a1_PH, a2_ERF = ctx.saved_tensors
        call: _Call = ctx.call
        gate_up, down = call.gate_up, call.down
        num_experts, num_hidden = gate_up.w_EIO.shape[:2]
        num_inner, num_chosen = down.w_EIO.shape[1], index_NK.shape[1]
        below: Ticket | None = ctx.below
        if below is not None:
            below.bring()
        if call.remake is not None:
            x_NH = call.remake(x_NH)
        if ctx.ticket is not None:
            h_SG = ctx.ticket.take()
        if h_SG is None:
            x_SX = (
                spread(x_NH, order_S, num_chosen) if u1_SR is None else spread_again(x_NH, u1_SR, order_S, num_chosen)
            )
            h_SG = grouped_mm(x_SX, gate_up.extend(call.name), offs=ends_E)
            del x_SX

        dy_NH = grads[0].contiguous()
        w_S = weight_NK.reshape(-1)[order_S]
        dg_SX = grouped_mm(
            spread_plain(dy_NH, order_S, num_chosen), down.extend(call.name).transpose(1, 2), offs=ends_E
        )
        da1 = db1 = da2 = db2 = detour_SF = du2_SR = None
        if a2_ERF is not None:
            du2_SR = dg_SX[:, num_inner : num_inner + down.rank]
            detour_SF = grouped_mm(du2_SR, a2_ERF, offs=ends_E)
        g_SF, dh_SG, dot_S = gate_backward(h_SG, dg_SX, detour_SF, w_S, call.alpha, call.limit)
        dbias_S = dg_SX[:, num_inner + down.rank]
        if down.pair is None or du2_SR is None:
            dw_NK = weight_slope(dot_S, dbias_S, place_NK, weight_NK)
        else:
            rank, scale = down.pair.rank, down.pair.scale
            weighted_SR, dw_NK, u2_NQ = down_slopes(
                du2_SR, u2_SR, w_S, dot_S, dbias_S, place_NK, index_NK, weight_NK, num_experts, rank, scale
            )
            da2 = grouped_mm(weighted_SR.t(), g_SF, offs=ends_E)[:, :rank].flatten(0, 1)
            db2 = dy_NH.t() @ u2_NQ
        del g_SF, dg_SX, detour_SF, du2_SR, dbias_S

        dx_SX = grouped_mm(dh_SG, gate_up.extend(call.name).transpose(1, 2), offs=ends_E)
        detour_NH = None
        if gate_up.pair is not None and u1_SR is not None:
            du1_SR = dx_SX[:, num_hidden : num_hidden + gate_up.rank]
            du1_NP = by_expert(du1_SR, place_NK, index_NK, num_experts, gate_up.pair.rank)
            detour_NH = du1_NP @ a1_PH
            da1 = du1_NP.t() @ x_NH
            db1 = rank_major(grouped_mm(u1_SR.t(), dh_SG, offs=ends_E), gate_up.pair)
        dx_NH = gather_sum(dx_SX, detour_NH, place_NK, num_hidden)
        dresidual_NH = dy_NH if ctx.needs_input_grad[3] else None
        return dx_NH, None, dw_NK, dresidual_NH, da1, db1, da2, db2, None
