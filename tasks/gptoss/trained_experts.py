"""Fused experts whose own weights are trained: grouped GEMMs, one pass over memory for the gate, biases in the GEMMs.

    [x | 1] @ [W; bias] = x W + bias            forward
    [x | 1]^T @ dy      = [dW; d bias]          both gradients in one GEMM

Kept for the backward pass are the input and the gate's argument, and not even that with `recompute`; transformers'
own grouped experts keep nine tensors of S rows.

Ring: edge (live tensors).  Shapes as in tasks/gptoss/experts.py.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import grouped_mm

from tasks.gptoss.fused import fused
from tasks.gptoss.gate import NUM_PLAIN, apply_gate, gate_backward
from tasks.gptoss.product import Product
from tasks.gptoss.rows import combine, gather_sum, sort_rows, spend, spread, spread_plain


def run_trained_experts(
    module: Any,  # Any: GptOssExperts, whose attributes nn.Module doesn't know
    x_NH: torch.Tensor,
    index_NK: torch.Tensor,
    weight_NK: torch.Tensor,
    *,
    recompute: bool = False,
) -> torch.Tensor:
    """Return the layer's output (N, H); gradients reach the input, the routing weights, both weights and both biases.

    Args:
        module: the experts of a layer.
        x_NH: input, in the dtype of the weights.
        index_NK: chosen experts.
        weight_NK: their routing weights.
        recompute: make the gate's argument (4 F bytes a row in bf16) again in the backward pass.
    Cost: forward 3 S H F multiply-adds, backward twice that; 2 S H F more with `recompute`.
    """
    return _TrainedExperts.apply(
        x_NH, index_NK, weight_NK, module.gate_up_proj, module.gate_up_proj_bias, module.down_proj,
        module.down_proj_bias, (module.alpha, module.limit, recompute),
    )  # fmt: skip


def train_experts(decoder: nn.Module, *, recompute: bool = False) -> None:
    """Let every expert layer of a GptOssModel run through `run_trained_experts`."""
    for layer in decoder.layers:  # pyright: ignore[reportGeneralTypeIssues]  # nn.Module knows no layers
        layer.mlp.experts.forward = _Forward(layer.mlp.experts, recompute)


class _Forward:
    def __init__(self, module: nn.Module, recompute: bool) -> None:
        self.module, self.recompute = module, recompute

    def __call__(
        self, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        return run_trained_experts(
            self.module, hidden_states, router_indices, routing_weights, recompute=self.recompute
        )


class _TrainedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # Any: torch's context
        x_NH: torch.Tensor,
        index_NK: torch.Tensor,
        weight_NK: torch.Tensor,
        w1_EHG: torch.Tensor,
        bias1_EG: torch.Tensor,
        w2_EFH: torch.Tensor,
        bias2_EH: torch.Tensor,
        rest: tuple[float, float, bool],
    ) -> torch.Tensor:
        alpha, limit, recompute = rest
        order_S, place_NK, ends_E = sort_rows(index_NK, len(w1_EHG))
        h_SG = _gate_argument(x_NH, order_S, ends_E, index_NK.shape[1], w1_EHG, bias1_EG)
        g_SX = apply_gate(h_SG, 0, alpha, limit)
        out_SH = grouped_mm(g_SX, Product(w_EIO=w2_EFH, bias_EO=bias2_EH).extend(), offs=ends_E)
        ctx.rest = rest
        kept = None if recompute else h_SG
        ctx.save_for_backward(x_NH, weight_NK, order_S, place_NK, ends_E, kept, w1_EHG, bias1_EG, w2_EFH, bias2_EH)
        return combine(out_SH, weight_NK, place_NK)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        spend(ctx)
        x_NH, weight_NK, order_S, place_NK, ends_E, h_SG, w1_EHG, bias1_EG, w2_EFH, bias2_EH = ctx.saved_tensors
        alpha, limit, _ = ctx.rest
        num_chosen, num_hidden, num_inner = weight_NK.shape[1], x_NH.shape[1], w2_EFH.shape[1]
        w_S = weight_NK.reshape(-1)[order_S]
        if h_SG is None:
            h_SG = _gate_argument(x_NH, order_S, ends_E, num_chosen, w1_EHG, bias1_EG)

        dy_SH = spread_plain(grads[0], order_S, num_chosen)
        dg_SX = grouped_mm(dy_SH, Product(w_EIO=w2_EFH, bias_EO=bias2_EH).extend().transpose(1, 2), offs=ends_E)
        g_SF, dh_SG, dot_S = gate_backward(h_SG, dg_SX, None, w_S, alpha, limit)
        dw_NK = (dot_S + dg_SX[:, num_inner])[place_NK].to(weight_NK.dtype)
        del h_SG, dg_SX
        dw2_EXH = grouped_mm(_weighted(g_SF, w_S, NUM_PLAIN).t(), dy_SH, offs=ends_E)
        dw2_EFH, dbias2_EH = dw2_EXH[:, :num_inner], dw2_EXH[:, num_inner]
        del g_SF, dy_SH, dw2_EXH

        x_SX = spread(x_NH, order_S, num_chosen)
        dw1_EXG = grouped_mm(x_SX.t(), dh_SG, offs=ends_E)
        dw1_EHG, dbias1_EG = dw1_EXG[:, :num_hidden], dw1_EXG[:, num_hidden]
        del x_SX, dw1_EXG
        dx_SH = grouped_mm(dh_SG, w1_EHG.transpose(1, 2), offs=ends_E)
        dx_NH = gather_sum(dx_SH, None, place_NK, num_hidden)
        return dx_NH, None, dw_NK, dw1_EHG, dbias1_EG, dw2_EFH, dbias2_EH, None


def _gate_argument(
    x_NH: torch.Tensor,
    order_S: torch.Tensor,
    ends_E: torch.Tensor,
    num_chosen: int,
    w1_EHG: torch.Tensor,
    bias1_EG: torch.Tensor,
) -> torch.Tensor:
    x_SX = spread(x_NH, order_S, num_chosen)
    return grouped_mm(x_SX, Product(w_EIO=w1_EHG, bias_EO=bias1_EG).extend(), offs=ends_E)


@fused
def _weighted(g_SF: torch.Tensor, w_S: torch.Tensor, num_extra: int) -> torch.Tensor:
    """Return [w g | w | 0], (S, F + extra)."""
    wide_S1 = w_S[:, None].float()
    zeros = wide_S1.new_zeros(len(w_S), num_extra - 1)
    return torch.cat(((g_SF.float() * wide_S1), wide_S1, zeros), dim=-1).to(g_SF.dtype)
