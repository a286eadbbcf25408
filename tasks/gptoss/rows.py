"""Rows between token order and expert order: the small steps around the grouped GEMMs, one kernel each on a GPU.

Ring: edge (live tensors).  Shapes: N tokens, K experts per token, S = N * K rows sorted by expert, E experts, H hidden,
R rank, P = E * R expert-major, Q = R * E rank-major, X columns appended.
"""

from typing import Any

import torch
from torch.nn.functional import pad

from tasks.gptoss.fused import fused
from tasks.gptoss.gate import NUM_PLAIN


def sort_rows(index_NK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return which (token, choice) each row is, the row of each (token, choice), and where each expert's rows end."""
    expert_S, order_S = index_NK.reshape(-1).sort(stable=True)
    ends_E = torch.searchsorted(expert_S, torch.arange(num_experts, device=expert_S.device), right=True).int()
    rows_S = torch.arange(len(order_S), device=order_S.device)
    place_S = torch.empty_like(order_S).scatter_(0, order_S, rows_S)
    return order_S, place_S.view(index_NK.shape), ends_E


@fused
def spread(x_NH: torch.Tensor, u_SR: torch.Tensor | None, order_S: torch.Tensor, num_chosen: int) -> torch.Tensor:
    """Return the rows that the experts read: [x | x A | 1 | 0] (S, H + X)."""
    parts = [x_NH[order_S // num_chosen]]
    if u_SR is not None:
        parts.append(u_SR)
    parts.append(pad(x_NH.new_ones(len(order_S), 1), (0, NUM_PLAIN - 1)))
    return torch.cat(parts, dim=1)


@fused
def pick(u_NP: torch.Tensor, index_NK: torch.Tensor, order_S: torch.Tensor, rank: int, wide: int) -> torch.Tensor:
    """Return the columns of each row's own expert (S, R), with zeros up to `wide` columns."""
    u_NER = u_NP.unflatten(1, (-1, rank))
    return pad(u_NER[order_S // index_NK.shape[1], index_NK.reshape(-1)[order_S]], (0, wide - rank))


@fused
def times(u_SR: torch.Tensor, w_S: torch.Tensor) -> torch.Tensor:
    """Return each row times its weight."""
    return (u_SR.float() * w_S[:, None].float()).to(u_SR.dtype)


@fused
def weight_slope(
    dot_S: torch.Tensor, dbias_S: torch.Tensor, place_NK: torch.Tensor, weight_NK: torch.Tensor
) -> torch.Tensor:
    """Return d loss / d weight (N, K) from its two parts."""
    return (dot_S + dbias_S)[place_NK].to(weight_NK.dtype)


@fused
def by_expert(
    rows_SR: torch.Tensor,
    place_NK: torch.Tensor,
    index_NK: torch.Tensor,
    weight_NK: torch.Tensor | None,
    num_experts: int,
    rank: int,
    *,
    rank_major: bool,
) -> torch.Tensor:
    """Return each token's rows at the columns of their experts (N, P) or (N, Q), zeros elsewhere; weighted if so."""
    experts_E = torch.arange(num_experts, device=rows_SR.device)
    experts = experts_E if rank_major else experts_E[:, None]
    total = torch.zeros((), device=rows_SR.device)
    for choice in range(index_NK.shape[1]):  # a loop over few: no tensor (N, K, E, R) on a CPU
        rows_NR = rows_SR[place_NK[:, choice], :rank].float()
        if weight_NK is not None:
            rows_NR = rows_NR * weight_NK[:, choice, None].float()
        is_mine = index_NK[:, choice, None, None] == experts
        total = total + torch.where(is_mine, rows_NR[:, :, None] if rank_major else rows_NR[:, None], 0.0)
    return total.flatten(1).to(rows_SR.dtype)


@fused
def combine(
    out_SH: torch.Tensor, weight_NK: torch.Tensor, place_NK: torch.Tensor, residual_NH: torch.Tensor | None = None
) -> torch.Tensor:
    """Add up what the experts of a token say, and the residual: a gather and a sum in an order of its own."""
    total_NH = (out_SH[place_NK].float() * weight_NK[:, :, None].float()).sum(1)
    if residual_NH is not None:
        total_NH = total_NH + residual_NH.float()
    return total_NH.to(out_SH.dtype)


@fused
def gather_sum(
    rows_SX: torch.Tensor, detour_NH: torch.Tensor | None, place_NK: torch.Tensor, num_hidden: int
) -> torch.Tensor:
    """Return the sum over the choices of a token (N, H), the way back of `spread`, and the detour."""
    total_NH = rows_SX[:, :num_hidden][place_NK].float().sum(1)
    if detour_NH is not None:
        total_NH = total_NH + detour_NH.float()
    return total_NH.to(rows_SX.dtype)


def spend(ctx: Any) -> None:  # Any: torch's context
    """Let a backward pass that writes over what was kept run once. Raises RuntimeError the second time."""
    if getattr(ctx, "is_spent", False):
        raise RuntimeError("a second backward pass through the experts: the first one wrote over what was kept")
    ctx.is_spent = True
