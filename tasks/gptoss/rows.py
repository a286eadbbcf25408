"""Rows between token order and expert order: the small steps around the grouped GEMMs, one kernel each on a GPU.

Ring: edge (live tensors).  Shapes: N tokens, K experts per token, S = N * K rows sorted by expert, E experts, H hidden,
R rank, P = E * R expert-major, Q = R * E rank-major, X columns appended.
"""

from typing import Any

import torch
from torch.nn.functional import pad

from tasks.gptoss.fused import fused, power_of_two
from tasks.gptoss.gate import NUM_PLAIN


def sort_rows(index_NK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return which (token, choice) each row is, the row of each (token, choice), and where each expert's rows end.

    Rows of an expert keep the order of their tokens.
    """
    if index_NK.is_cuda and index_NK.numel():
        return _count_rows(index_NK.contiguous(), num_experts)
    expert_S, order_S = index_NK.reshape(-1).sort(stable=True)
    ends_E = torch.searchsorted(expert_S, torch.arange(num_experts, device=expert_S.device), right=True).int()
    rows_S = torch.arange(len(order_S), device=order_S.device)
    place_S = torch.empty_like(order_S).scatter_(0, order_S, rows_S)
    return order_S, place_S.view(index_NK.shape), ends_E


def _count_rows(index_NK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort by counting, in two kernels."""
    experts, num_rows = power_of_two(num_experts), index_NK.numel()
    block = max(16, min(512, 16384 // experts))
    num_blocks = -(-num_rows // block)
    counts = index_NK.new_empty(num_blocks, num_experts, dtype=torch.int32)
    order_S, place_NK = index_NK.new_empty(num_rows, dtype=torch.int64), index_NK.new_empty(index_NK.shape)
    ends_E = index_NK.new_empty(num_experts, dtype=torch.int32)
    _triton().count_experts[(num_blocks,)](index_NK, counts, num_rows, num_experts, EXPERTS=experts, BLOCK=block)
    _triton().place_rows[(num_blocks,)](
        index_NK, counts, order_S, place_NK, ends_E, num_rows, num_experts, num_blocks,
        EXPERTS=experts, BLOCK=block, CHUNK=max(1, min(64, 4096 // experts)),
    )  # fmt: skip
    return order_S, place_NK, ends_E


def spread(x_NH: torch.Tensor, order_S: torch.Tensor, num_chosen: int) -> torch.Tensor:
    """Return the rows that experts without adapter read: [x | 1 | 0] (S, H + 8)."""
    if x_NH.is_cuda:
        return _spread_on_gpu(x_NH, order_S, num_chosen, num_tail=NUM_PLAIN)
    return torch.cat([x_NH[order_S // num_chosen], _one(x_NH, len(order_S))], dim=1)


def spread_plain(x_NH: torch.Tensor, order_S: torch.Tensor, num_chosen: int) -> torch.Tensor:
    """Return each token's row in the places of its choices (S, H)."""
    return _spread_on_gpu(x_NH, order_S, num_chosen) if x_NH.is_cuda else x_NH[order_S // num_chosen]


def spread_with(
    x_NH: torch.Tensor, u_NP: torch.Tensor, index_NK: torch.Tensor, order_S: torch.Tensor, rank: int, wide: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows that experts read, [x | x A | 1 | 0] (S, H + X), and x A of each row's expert (S, `wide`)."""
    num_chosen = index_NK.shape[1]
    if x_NH.is_cuda:
        u_SR = x_NH.new_empty(len(order_S), wide)
        return _spread_on_gpu(x_NH, order_S, num_chosen, wide + NUM_PLAIN, u_NP, u_SR, index_NK, rank), u_SR
    token_S, u_NER = order_S // num_chosen, u_NP.unflatten(1, (-1, rank))
    u_SR = pad(u_NER[token_S, index_NK.reshape(-1)[order_S]], (0, wide - rank))
    return torch.cat([x_NH[token_S], u_SR, _one(x_NH, len(order_S))], dim=1), u_SR


def spread_again(x_NH: torch.Tensor, u_SR: torch.Tensor, order_S: torch.Tensor, num_chosen: int) -> torch.Tensor:
    """Return the rows of `spread_with` once more."""
    if x_NH.is_cuda:
        wide = u_SR.shape[1]
        return _spread_on_gpu(x_NH, order_S, num_chosen, wide + NUM_PLAIN, u_SR, u_SR, rank=wide)
    return torch.cat([x_NH[order_S // num_chosen], u_SR, _one(x_NH, len(order_S))], dim=1)


def _spread_on_gpu(
    x_NH: torch.Tensor,
    order_S: torch.Tensor,
    num_chosen: int,
    num_tail: int = 0,
    u: torch.Tensor | None = None,
    u_SR: torch.Tensor | None = None,
    index_NK: torch.Tensor | None = None,
    rank: int = 0,
) -> torch.Tensor:
    """Return [x | u | 1 | 0] with `num_tail` columns behind x.

    u is (S, R), or with `index_NK` (N, P), of which each row's expert has its columns; these are left in `u_SR`, too.
    """
    num_rows, width = len(order_S), x_NH.shape[1]
    out = x_NH.new_empty(num_rows, width + num_tail)
    x_NH = x_NH.contiguous()
    if num_rows:
        u, kept = (x_NH, x_NH) if u is None or u_SR is None else (u, u_SR)
        _triton().spread[(num_rows,)](
            x_NH, order_S, order_S if index_NK is None else index_NK.contiguous(), u, u.stride(0), out, out.stride(0),
            kept, width, num_chosen, RANK=rank, WIDE=0 if u_SR is None else u_SR.shape[1], NUM_TAIL=num_tail,
            TAIL=power_of_two(num_tail) if num_tail else 0, IS_NEW=index_NK is not None, BLOCK=power_of_two(width),
        )  # fmt: skip
    return out


def _one(like: torch.Tensor, num_rows: int) -> torch.Tensor:
    return pad(like.new_ones(num_rows, 1), (0, NUM_PLAIN - 1))


@fused
def weight_slope(
    dot_S: torch.Tensor, dbias_S: torch.Tensor, place_NK: torch.Tensor, weight_NK: torch.Tensor
) -> torch.Tensor:
    """Return d loss / d weight (N, K) from its two parts."""
    return (dot_S + dbias_S)[place_NK].to(weight_NK.dtype)


@fused
def down_slopes(
    du_SR: torch.Tensor,
    u_SR: torch.Tensor,
    w_S: torch.Tensor,
    dot_S: torch.Tensor,
    dbias_S: torch.Tensor,
    place_NK: torch.Tensor,
    index_NK: torch.Tensor,
    weight_NK: torch.Tensor,
    num_experts: int,
    rank: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return w du (S, R), d loss / d weight (N, K), and scale w u of each token at its experts' columns (N, Q)."""
    weighted_SR = (du_SR.float() * w_S[:, None].float()).to(du_SR.dtype)
    dw_NK = (dot_S + dbias_S)[place_NK].to(weight_NK.dtype)
    experts_E = torch.arange(num_experts, device=u_SR.device)
    total_NRE = torch.zeros((), device=u_SR.device)
    for choice in range(index_NK.shape[1]):  # a loop over few: no tensor (N, K, E, R) on a CPU
        rows_NR = u_SR[place_NK[:, choice], :rank].float() * (scale * weight_NK[:, choice, None].float())
        total_NRE = total_NRE + torch.where(index_NK[:, choice, None, None] == experts_E, rows_NR[:, :, None], 0.0)
    return weighted_SR, dw_NK, total_NRE.flatten(1).to(u_SR.dtype)


@fused
def by_expert(
    du_SR: torch.Tensor, place_NK: torch.Tensor, index_NK: torch.Tensor, num_experts: int, rank: int
) -> torch.Tensor:
    """Return each token's rows at the columns of its experts (N, P), zeros elsewhere."""
    experts_E1 = torch.arange(num_experts, device=du_SR.device)[:, None]
    total_NER = torch.zeros((), device=du_SR.device, dtype=du_SR.dtype)
    for choice in range(index_NK.shape[1]):
        rows_NR = du_SR[place_NK[:, choice], :rank]
        total_NER = total_NER + torch.where(index_NK[:, choice, None, None] == experts_E1, rows_NR[:, None], 0.0)
    return total_NER.flatten(1)


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


def _triton() -> Any:  # Any: a module of Triton kernels, which exists with CUDA builds of torch only
    from tasks.gptoss import rows_triton

    return rows_triton
