"""LoRA on fused expert tensors without ever forming W + BA and without computing a gradient of W.

    y = sum over the K chosen experts of weight * down(gate(gate_up(x)))

PEFT's ParamWrapper adds B A to all experts of a layer in each forward pass and computes their whole
gradient in each backward pass. Here rows are sorted by expert and grouped GEMMs multiply them with
the frozen weights; the adapter's second half and the bias ride along as more rows of the weight:

    [x | x A | 1] @ [W; B; bias] = x W + (x A) B + bias          one GEMM, one rounding
    dy @ [W; B; bias]^T = [dy W^T | d(x A) | dy . bias]          and its gradients

Kept for the backward pass are the input, the gate's argument and the R columns of x A. The output of
`down` is not: d loss / d weight is the gradient that reaches the gate, times the gate.

Ring: edge (live tensors).  Shapes: N tokens, K experts per token, S = N * K rows sorted by expert,
E experts, H hidden, F inner, I in, O out, R rank rounded up to 8, X = R + 8 rows appended (8 without adapter).
Source: Hu et al., arXiv:2106.09685; layout of the adapter: PEFT 0.21 ParamWrapper.get_delta_weight.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import grouped_mm, pad

from tasks.errors import ShapeError
from tasks.gptoss.fused import fused
from tasks.gptoss.gate import apply_gate, gate_backward

_ALIGNED = 8  # grouped_mm wants rows of 16 bytes
NUM_PLAIN = _ALIGNED  # rows behind a weight without adapter: its bias, and zeros


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One frozen expert tensor with its bias and, maybe, an adapter.

    `extended` is [W; (B;) bias; 0] when it is kept (`keep_extended`), else it is made for each pass.
    """

    w_EIO: torch.Tensor
    bias_EO: torch.Tensor
    a_EIR: torch.Tensor | None = None
    b_ERO: torch.Tensor | None = None
    extended_EXO: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """R, 0 without adapter."""
        return 0 if self.a_EIR is None else self.a_EIR.shape[2]

    @torch.no_grad()
    def extend(self) -> torch.Tensor:
        """Return [W; B; bias; 0] (E, I + X, O) with today's B."""
        num_in = self.w_EIO.shape[1]
        if self.extended_EXO is None:
            lines = self.w_EIO.new_zeros(len(self.w_EIO), self.rank + _ALIGNED, self.w_EIO.shape[2])
            whole = torch.cat([self.w_EIO, lines], dim=1)
            whole[:, num_in + self.rank] = self.bias_EO
        else:
            whole = self.extended_EXO
        if self.b_ERO is not None:
            whole[:, num_in : num_in + self.rank] = self.b_ERO
        return whole


def keep_extended(w_EIO: torch.nn.Parameter, bias_EO: torch.Tensor, rank: int) -> torch.Tensor:
    """Move a frozen weight into the first rows of [W; B; bias; 0] and return that; the parameter stays as a view of it.

    Costs (R + 8) / I more memory and saves a copy of the weight in each pass.
    """
    product = Product(w_EIO=w_EIO.data, bias_EO=bias_EO)
    whole = pad(product.extend(), (0, 0, 0, _round_up(rank)))
    whole[:, w_EIO.shape[1] :] = whole[:, w_EIO.shape[1] :].roll(_round_up(rank), dims=1)
    w_EIO.data = whole[:, : w_EIO.shape[1]]
    return whole


def lora_pair(
    a_RI: torch.Tensor, b_OR: torch.Tensor, num_experts: int, scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PEFT's pair as A (E, I, R) and scale * B (E, R, O); the rank is rounded up to 8 with zeros.

    Args:
        a_RI: (E*R, I), row e*R + k is rank k of expert e.
        b_OR: (O, R*E), column k*E + e is rank k of expert e.
        num_experts: E.
        scale: alpha / R, or alpha / sqrt(R).
        dtype: that of the weights.
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
    if missing := _round_up(rank) - rank:
        a_EIR, b_ERO = pad(a_EIR, (0, missing)), pad(b_ERO, (0, 0, 0, missing))
    return a_EIR.to(dtype).contiguous(), b_ERO.to(dtype).contiguous()


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
) -> torch.Tensor:
    """Return the layer's output (N, H).

    Args:
        x_NH: input, in the dtype of the weights.
        index_NK: chosen experts.
        weight_NK: their routing weights.
        gate_up: H -> 2 F, gate and up columns interleaved.
        down: F -> H.
        alpha: of the gate.
        limit: of the gate.
        recompute: make the gate's argument (4 F bytes a row in bf16, by far the most that is kept) again in the
            backward pass.
    Cost: forward 3 S H F multiply-adds, backward the same; 2 S H F more with `recompute`.
    """
    return _Experts.apply(
        x_NH, index_NK, weight_NK, gate_up.a_EIR, gate_up.b_ERO, down.a_EIR, down.b_ERO,
        (gate_up, down, alpha, limit, recompute),
    )  # fmt: skip


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # Any: torch's context
        x_NH: torch.Tensor,
        index_NK: torch.Tensor,
        weight_NK: torch.Tensor,
        a1: torch.Tensor | None,
        b1: torch.Tensor | None,
        a2: torch.Tensor | None,
        b2: torch.Tensor | None,
        rest: tuple[Product, Product, float, float, bool],
    ) -> torch.Tensor:
        gate_up, down, alpha, limit, recompute = rest
        order_S, place_NK, ends_E = sort_rows(index_NK, len(gate_up.w_EIO))
        h_SG, u1 = _gate_argument(x_NH, order_S, ends_E, gate_up, index_NK.shape[1])
        g_SX = apply_gate(h_SG, down.rank + _ALIGNED, alpha, limit)
        u2 = _append(g_SX, ends_E, down)
        out_SH = grouped_mm(g_SX, down.extend(), offs=ends_E)
        ctx.rest = rest
        ctx.save_for_backward(x_NH, weight_NK, order_S, place_NK, ends_E, None if recompute else h_SG, u1, u2, a1, a2)
        return combine(out_SH, weight_NK, place_NK)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NH, weight_NK, order_S, place_NK, ends_E, h_SG, u1, u2, a1, a2 = ctx.saved_tensors
        gate_up, down, alpha, limit, _ = ctx.rest
        num_chosen, num_hidden, num_inner = weight_NK.shape[1], x_NH.shape[1], down.w_EIO.shape[1]
        token_S, w_S = order_S // num_chosen, weight_NK.reshape(-1)[order_S]
        if h_SG is None:
            h_SG, u1 = _gate_argument(x_NH, order_S, ends_E, gate_up, num_chosen)

        dy_SH = grads[0][token_S]
        dg_SX = grouped_mm(dy_SH, down.extend().transpose(1, 2), offs=ends_E)
        da1 = db1 = da2 = db2 = du2 = detour = None
        if a2 is not None:
            du2 = dg_SX[:, num_inner : num_inner + down.rank]
            detour = grouped_mm(du2, a2.transpose(1, 2), offs=ends_E)
        g_SF, dh_SG, dot_S = gate_backward(h_SG, dg_SX, detour, w_S, alpha, limit)
        dw_NK = (dot_S + dg_SX[:, num_inner + down.rank])[place_NK].to(weight_NK.dtype)
        if du2 is not None:
            da2 = grouped_mm(g_SF.t(), _times(du2, w_S), offs=ends_E)
            db2 = grouped_mm(_times(u2, w_S).t(), dy_SH, offs=ends_E)
        del h_SG, g_SF, dy_SH, dg_SX, detour

        dx_SX = grouped_mm(dh_SG, gate_up.extend().transpose(1, 2), offs=ends_E)
        detour = None
        if u1 is not None:
            du1 = dx_SX[:, num_hidden : num_hidden + gate_up.rank]
            detour = grouped_mm(du1, a1.transpose(1, 2), offs=ends_E)
            da1 = grouped_mm(x_NH[token_S].t(), du1, offs=ends_E)
            db1 = grouped_mm(u1.t(), dh_SG, offs=ends_E)
        dx_NH = gather_sum(dx_SX, detour, place_NK, num_hidden)
        return dx_NH, None, dw_NK, da1, db1, da2, db2, None


def sort_rows(index_NK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return which (token, choice) each row is, the row of each (token, choice), and where each expert's rows end."""
    expert_S, order_S = index_NK.reshape(-1).sort(stable=True)
    ends_E = torch.searchsorted(expert_S, torch.arange(num_experts, device=expert_S.device), right=True).int()
    rows_S = torch.arange(len(order_S), device=order_S.device)
    place_S = torch.empty_like(order_S).scatter_(0, order_S, rows_S)
    return order_S, place_S.view(index_NK.shape), ends_E


def _gate_argument(
    x_NH: torch.Tensor, order_S: torch.Tensor, ends_E: torch.Tensor, gate_up: Product, num_chosen: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return x W + (x A) B + bias (S, G), and x A."""
    x_SX = spread(x_NH, order_S, num_chosen, gate_up.rank + _ALIGNED)
    u1 = _append(x_SX, ends_E, gate_up)
    return grouped_mm(x_SX, gate_up.extend(), offs=ends_E), u1


def _append(x_SX: torch.Tensor, ends_E: torch.Tensor, product: Product) -> torch.Tensor | None:
    """Write [x A | 1 | 0] behind x; return x A."""
    num_in = product.w_EIO.shape[1]
    x_SX[:, num_in + product.rank :] = 0
    x_SX[:, num_in + product.rank] = 1
    if product.a_EIR is None:
        return None
    u = grouped_mm(x_SX[:, :num_in], product.a_EIR, offs=ends_E)
    x_SX[:, num_in : num_in + product.rank] = u
    return u


@fused
def spread(x_NH: torch.Tensor, order_S: torch.Tensor, num_chosen: int, num_extra: int) -> torch.Tensor:
    """Return the rows (S, H + extra) that the experts read; what is extra is zero."""
    return pad(x_NH[order_S // num_chosen], (0, num_extra))


@fused
def _times(u_SR: torch.Tensor, w_S: torch.Tensor) -> torch.Tensor:
    return (u_SR.float() * w_S[:, None].float()).to(u_SR.dtype)


@fused
def combine(out_SH: torch.Tensor, weight_NK: torch.Tensor, place_NK: torch.Tensor) -> torch.Tensor:
    """Add up what the experts of a token say: a gather and a sum, whose order does not depend on threads."""
    return (out_SH[place_NK].float() * weight_NK[:, :, None].float()).sum(1).to(out_SH.dtype)


@fused
def gather_sum(
    rows_SX: torch.Tensor, detour_SH: torch.Tensor | None, place_NK: torch.Tensor, num_hidden: int
) -> torch.Tensor:
    """Return the sum over the choices of a token (N, H): the way back of `spread`."""
    each_NKH = rows_SX[:, :num_hidden][place_NK].float()
    if detour_SH is not None:
        each_NKH = each_NKH + detour_SH[place_NK].float()
    return each_NKH.sum(1).to(rows_SX.dtype)


def _round_up(rank: int) -> int:
    return -(-rank // _ALIGNED) * _ALIGNED
