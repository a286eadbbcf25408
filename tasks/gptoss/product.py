"""A frozen expert tensor, its adapter in PEFT's own layout, and both in the shape that a grouped GEMM wants.

    [W; B; bias; 0]     rows of the weight, of the adapter's second half, one of the bias, zeros

Ring: edge (live tensors).  Shapes: E experts, I in, O out, R rank, P = E * R expert-major, Q = R * E rank-major,
X = R rounded up to 8, and 8, rows appended (8 without adapter).
Source: layout of the adapter: PEFT 0.21 ParamWrapper.get_delta_weight.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from tasks.errors import ShapeError
from tasks.gptoss.gate import NUM_PLAIN

_ALIGNED = 8  # grouped_mm wants rows of 16 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """An adapter of one expert tensor, in PEFT's own layout.

    Args:
        a_PI: row e*R + k is rank k of expert e.
        b_OQ: column k*E + e is rank k of expert e.
        scale: alpha / R, or alpha / sqrt(R).
        num_experts: E.
    """

    a_PI: torch.Tensor
    b_OQ: torch.Tensor
    scale: float
    num_experts: int

    def __post_init__(self) -> None:
        if self.a_PI.shape[0] != self.b_OQ.shape[1] or self.a_PI.shape[0] % self.num_experts:
            raise ShapeError(
                f"LoRA pair does not fit {self.num_experts} experts: A is (E*R, I) = {tuple(self.a_PI.shape)}, "
                f"B is (O, R*E) = {tuple(self.b_OQ.shape)}"
            )

    @property
    def rank(self) -> int:
        """R."""
        return self.a_PI.shape[0] // self.num_experts


class Era:
    """A time in which adapters stay as they are, so that what is made of them may be kept: the passes of one step.

    `name` is None outside of it, as it is for whoever does not say when weights change.
    """

    def __init__(self) -> None:
        """Begin outside."""
        self.name: object = None

    def begin(self) -> None:
        """Say that the adapters stay as they are from now on; nothing if that was said."""
        self.name = self.name or object()

    def end(self) -> None:
        """Say that they may change."""
        self.name = None


class Extended:
    """[W; (B;) bias; 0] (E, I + X, O), kept, and what was made of the adapter for the era, or the pass, `made_for`."""

    def __init__(self, whole_EXO: torch.Tensor) -> None:
        """Hold what `keep_extended` made."""
        self.whole_EXO = whole_EXO
        self.a_PI: torch.Tensor | None = None
        self.made_for: object = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One frozen expert tensor with its bias and, maybe, an adapter.

    `extended` is [W; (B;) bias; 0] when it is kept (`keep_extended`), else it is made for each pass.
    """

    w_EIO: torch.Tensor
    bias_EO: torch.Tensor
    pair: Pair | None = None
    extended: Extended | None = None

    @property
    def rank(self) -> int:
        """R rounded up to 8, 0 without adapter."""
        return 0 if self.pair is None else round_up(self.pair.rank)

    @torch.no_grad()
    def extend(self, name: object = None) -> torch.Tensor:
        """Return [W; scale * B; bias; 0] (E, I + X, O) with today's B; under one `name` it is written once."""
        num_in = self.w_EIO.shape[1]
        if self.extended is None:
            lines = self.w_EIO.new_zeros(len(self.w_EIO), self.rank + NUM_PLAIN, self.w_EIO.shape[2])
            whole = torch.cat([self.w_EIO, lines], dim=1)
            whole[:, num_in + self.rank] = self.bias_EO
        else:
            whole = self.extended.whole_EXO
            if name is not None and self.extended.made_for is name:
                return whole
            self.extended.a_PI, self.extended.made_for = None, name
        if self.pair is not None:
            b_ORE = self.pair.b_OQ.view(len(self.pair.b_OQ), self.pair.rank, -1)
            torch.mul(b_ORE.permute(2, 1, 0), self.pair.scale, out=whole[:, num_in : num_in + self.pair.rank])
        return whole

    @torch.no_grad()
    def first_half(self, name: object = None) -> torch.Tensor | None:
        """Return today's A (P, I) in the weights' dtype; under one `name` it is cast once. None without adapter."""
        if self.pair is None:
            return None
        if self.extended is None:
            return self.pair.a_PI.to(self.w_EIO.dtype)
        if self.extended.made_for is not name or self.extended.a_PI is None:
            self.extend(name)
            self.extended.a_PI = self.pair.a_PI.to(self.w_EIO.dtype)
        return self.extended.a_PI


def keep_extended(w_EIO: torch.nn.Parameter, bias_EO: torch.Tensor, rank: int) -> Extended:
    """Move a frozen weight into the first rows of [W; B; bias; 0] and return that; the parameter stays as a view of it.

    Costs (R + 8) / I more memory and saves a copy of the weight in each pass.
    """
    product = Product(w_EIO=w_EIO.data, bias_EO=bias_EO)
    whole = pad(product.extend(), (0, 0, 0, round_up(rank)))
    whole[:, w_EIO.shape[1] :] = whole[:, w_EIO.shape[1] :].roll(round_up(rank), dims=1)
    w_EIO.data = whole[:, : w_EIO.shape[1]]
    return Extended(whole)


def by_rank(a_PI: torch.Tensor, rank: int) -> torch.Tensor:
    """Return A as (E, R rounded up, I)."""
    a_ERI = a_PI.unflatten(0, (-1, rank))
    missing = round_up(rank) - rank
    return pad(a_ERI, (0, 0, 0, missing)) if missing else a_ERI


def rank_major(db_ERO: torch.Tensor, pair: Pair) -> torch.Tensor:
    """Return B's gradient as the parameter lies (O, R*E), from that of scale * B: one kernel."""
    db_OQ = torch.empty_like(pair.b_OQ)
    db_ORE = db_OQ.view(len(db_OQ), pair.rank, -1)
    torch.mul(db_ERO[:, : pair.rank].permute(2, 1, 0), pair.scale, out=db_ORE)
    return db_OQ


def round_up(rank: int) -> int:
    """Return the next multiple of 8."""
    return -(-rank // _ALIGNED) * _ALIGNED


def active_adapter(module: Any) -> str | None:  # Any: one of PEFT's LoRA layers
    """Return which adapter a layer uses now: None while they are switched off or merged, or it has none that is active.

    Raises ValueError for several at once: their sum is not computed here.
    """
    if module.disable_adapters or module.merged:
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) > 1:
        raise ValueError(f"adapters {', '.join(names)} are active at once: our kernels take one")
    return names[0] if names else None
