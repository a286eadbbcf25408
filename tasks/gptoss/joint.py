"""The attention half of a frozen gpt-oss layer with its adapters, as one step that keeps little.

    x -> y = x + o(attention(rotate(q, k, v of norm(x)))), norm(y)

q, k and v are one GEMM: their weights lie side by side, and as in tasks/gptoss/experts.py the adapters' second
halves and the biases ride along as more columns of them:

    [norm(x) | 1 | norm(x) A] @ [W | bias | B]^T

PEFT's Linear runs some twenty kernels for an adapter's forward and backward half, and keeps the norm's output for
each. Kept here are x, the rotated q, k and v, the attention's output and its log-sum-exp; norm(x) is made again.

Ring: edge (touches a live model).  Shapes: N tokens, H hidden, A heads, D head size, O the outputs of q, k and v
together, R all ranks of q, k and v together, X = 8 + R rounded up to 8.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from tasks.errors import ShapeError
from tasks.gptoss.attention import Documents, forward_of
from tasks.gptoss.gate import NUM_PLAIN
from tasks.gptoss.norm import add_norm, norm_back, norm_wide, normed
from tasks.gptoss.product import Era, active_adapter, round_up
from tasks.gptoss.rotation import rotate, rotate_back

_Adapter = tuple[torch.Tensor, torch.Tensor, float]  # A (R, I), B (O, R) and the scale


def can_join(layer: Any) -> bool:  # Any: GptOssDecoderLayer
    """Say whether a layer is what this module computes: frozen, with plain adapters or none on its projections."""
    attention = layer.self_attn
    frozen = (attention.sinks, layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return not any(weight.requires_grad for weight in frozen) and all(
        _is_plain(getattr(attention, name)) for name in names
    )


def _is_plain(module: nn.Module) -> bool:
    if type(module) is LoraLinear:
        dropouts = [each for each in module.lora_dropout.values() if not isinstance(each, nn.Identity)]
        biased = any(half.bias is not None for half in module.lora_B.values())
        if dropouts or biased or module.lora_variant or module.fan_in_fan_out or len(module.lora_A) != 1:
            return False
        module = module.get_base_layer()
    if type(module) is not nn.Linear or module.bias is None:
        return False
    return not (module.weight.requires_grad or module.bias.requires_grad)  # PEFT's bias="lora_only" trains the latter


@dataclass(frozen=True, slots=True, kw_only=True)
class _Half:
    """One projection, and where its outputs and its ranks lie among those it is joined with."""

    attention: Any  # Any: GptOssAttention
    name: str
    outputs: slice
    ranks: slice

    @property
    def module(self) -> Any:  # Any: a Linear, or PEFT's around one
        """What the layer has under that name now: PEFT's `unload` takes its own off again."""
        return getattr(self.attention, self.name)

    def find_adapter(self) -> _Adapter | None:
        """Return what works on it now; None while there is none, or it is switched off. Dear: ask once in a pass."""
        module = self.module
        name = active_adapter(module) if isinstance(module, LoraLinear) else None
        if name is None:
            return None
        a: Any = module.lora_A[name]  # Any: a Linear in a ModuleDict
        b: Any = module.lora_B[name]  # Any: as above
        return a.weight, b.weight, module.scaling[name]


class Joined:
    """Linear layers that read the same input, side by side as one matrix [W | bias | B] (O, I + X)."""

    def __init__(self, attention: Any, names: Sequence[str]) -> None:  # Any: GptOssAttention
        """Move the layers' weights into the matrix; their parameters stay as views of it."""
        self.halves: list[_Half] = []
        num_outputs = num_ranks = 0
        modules = [getattr(attention, name) for name in names]
        bases = [_base(module) for module in modules]
        for name, module, base in zip(names, modules, bases, strict=True):
            rank: int = max(module.r.values()) if isinstance(module, LoraLinear) else 0
            outputs, ranks = slice(num_outputs, num_outputs + base.out_features), slice(num_ranks, num_ranks + rank)
            self.halves.append(_Half(attention=attention, name=name, outputs=outputs, ranks=ranks))
            num_outputs, num_ranks = outputs.stop, ranks.stop
        self.a_RI: torch.Tensor | None = None
        self.made_for: tuple[object, ...] = ()
        self.num_inputs, self.num_ranks = bases[0].in_features, num_ranks
        self.whole_OX = bases[0].weight.new_zeros(num_outputs, self.num_inputs + NUM_PLAIN + round_up(num_ranks))
        self._take_in()

    def _take_in(self) -> None:
        """Take in weights that lie elsewhere: all in the beginning, and those that PEFT's safe merge put there."""
        for half in self.halves:
            base, place_OI = _base(half.module), self.whole_OX[half.outputs, : self.num_inputs]
            if base.weight.data_ptr() != place_OI.data_ptr():
                place_OI.copy_(base.weight.data)
                self.whole_OX[half.outputs, self.num_inputs] = base.bias.data
                base.weight.data = place_OI

    @property
    def first_rank(self) -> int:
        """The column where B begins."""
        return self.num_inputs + NUM_PLAIN

    @torch.no_grad()
    def stack(self, name: object, adapters: Sequence[_Adapter | None]) -> torch.Tensor | None:
        """Write today's scale * B and return A of all (R, I) in the weights' dtype.

        Under one `name` once, while the adapters are the same. Raises ShapeError for a later one of another rank.
        """
        made_for = (name, *(id(adapter and adapter[0]) for adapter in adapters))
        if name is not None and self.made_for == made_for:
            return self.a_RI
        self._take_in()
        parts = []
        for half, adapter in zip(self.halves, adapters, strict=True):
            rank = half.ranks.stop - half.ranks.start
            if adapter is None:
                parts.append(self.whole_OX.new_zeros(rank, self.num_inputs))
                continue
            a_RI, b_OR, scale = adapter
            if len(a_RI) != rank:
                raise ShapeError(f"an adapter of rank {len(a_RI)} on {half.name}, whose layer was joined with {rank}")
            parts.append(a_RI)
            torch.mul(b_OR, scale, out=self.whole_OX[half.outputs, self.first_rank :][:, half.ranks])
        self.a_RI = torch.cat(parts).to(self.whole_OX.dtype) if any(adapters) else None
        self.made_for = made_for
        return self.a_RI

    def slopes(
        self, adapters: Sequence[_Adapter | None], da_RI: torch.Tensor | None, db_OR: torch.Tensor | None
    ) -> list[torch.Tensor | None]:
        """Return the gradients of A and B of each layer, from those of A and of all columns of scale * B."""
        found: list[torch.Tensor | None] = []
        for half, adapter in zip(self.halves, adapters, strict=True):
            if adapter is None or da_RI is None or db_OR is None:
                found += [None, None]
            else:
                found += [da_RI[half.ranks], _rescaled(db_OR[half.outputs, half.ranks], adapter)]
        return found


def _rescaled(slope_OR: torch.Tensor, adapter: _Adapter) -> torch.Tensor:
    """Return B's gradient from that of scale * B: one kernel."""
    _, b_OR, scale = adapter
    return torch.mul(slope_OR, scale, out=torch.empty_like(b_OR))


class JointAttention:
    """The attention half of one layer, with the weights of q, k and v side by side."""

    def __init__(self, layer: Any, era: Era) -> None:  # Any: GptOssDecoderLayer
        """Take a layer that `can_join`; `era` says when adapters change."""
        attention = layer.self_attn
        self.attention, self.norm, self.next_norm = attention, layer.input_layernorm, layer.post_attention_layernorm
        self.era = era
        self.qkv = Joined(attention, ("q_proj", "k_proj", "v_proj"))
        self.o = _Half(attention=attention, name="o_proj", outputs=slice(None), ranks=slice(None))
        self.o_halves: tuple[torch.Tensor, torch.Tensor] | None = None
        self.o_made_for: tuple[object, ...] = ()

    def __call__(
        self, x_NH: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], documents: Documents
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y = x + attention and its norm, (N, H) each."""
        cos_ND, sin_ND = (part.flatten(0, 1) for part in position_embeddings)
        adapters = [half.find_adapter() for half in (*self.qkv.halves, self.o)]
        tensors = [each for adapter in adapters for each in (adapter or (None, None))[:2]]
        return _Attend.apply(x_NH, self, adapters, documents, cos_ND, sin_ND, *tensors)

    @torch.no_grad()
    def last_halves(self, adapter: _Adapter | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return o's A and scale * B in `dtype`, None without adapter; made once in an era."""
        if adapter is None:
            return None
        a_RO, b_HR, scale = adapter
        made_for = (self.era.name, id(a_RO))
        if self.o_halves is None or self.era.name is None or self.o_made_for != made_for:
            self.o_halves, self.o_made_for = (a_RO.to(dtype), (b_HR * scale).to(dtype)), made_for
        return self.o_halves


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # Any: torch's context
        x_NH: torch.Tensor,
        joint: JointAttention,
        adapters: list[_Adapter | None],
        documents: Documents,
        cos_ND: torch.Tensor,
        sin_ND: torch.Tensor,
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        del tensors  # those of `adapters`, for autograd
        attention, qkv, norm = joint.attention, joint.qkv, joint.norm
        heads, size = attention.q_proj.out_features // attention.head_dim, attention.head_dim
        a_RH = qkv.stack(joint.era.name, adapters[:3])
        x_NX = norm_wide(x_NH, norm.weight, norm.variance_epsilon, qkv.whole_OX.shape[1] - x_NH.shape[1])
        u_NR = None
        if a_RH is not None:
            u_NR = x_NX[:, : x_NH.shape[1]] @ a_RH.t()
            x_NX[:, qkv.first_rank :][:, : qkv.num_ranks] = u_NR
        qkv_NO = rotate(x_NX @ qkv.whole_OX.t(), cos_ND, sin_ND, heads)
        del x_NX
        q_NAD, k_NGD, v_NGD = _heads(qkv_NO, heads, size)
        window, scale = attention.sliding_window, attention.scaling
        out_NAD, lse_AN, engine, state = forward_of(q_NAD, k_NGD, v_NGD, attention.sinks, documents, window, scale)
        out_NO = out_NAD.flatten(1)
        base = _base(attention.o_proj)
        more_NH = torch.addmm(base.bias, out_NO, base.weight.t())
        uo_NR, last = None, joint.last_halves(adapters[3], out_NO.dtype)
        if last is not None:
            uo_NR = out_NO @ last[0].t()
            more_NH.addmm_(uo_NR, last[1].t())
        after = joint.next_norm
        y_NH, normed_NH = add_norm(x_NH, more_NH, after.weight, after.variance_epsilon)
        ctx.rest = joint, adapters, documents, engine, window, scale, heads, size, last
        ctx.save_for_backward(x_NH, y_NH, qkv_NO, out_NO, lse_AN, cos_ND, sin_ND, u_NR, a_RH, uo_NR, *state)
        return y_NH, normed_NH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:  # Any: torch's context; tensors or None
        joint, adapters, documents, engine, window, scale, heads, size, last = ctx.rest
        x_NH, y_NH, qkv_NO, out_NO, lse_AN, cos_ND, sin_ND, u_NR, a_RH, uo_NR, *state = ctx.saved_tensors
        attention, qkv, norm, after = joint.attention, joint.qkv, joint.norm, joint.next_norm
        dy_NH = norm_back(y_NH, after.weight, grads[1], grads[0], after.variance_epsilon)
        dout_NO = dy_NH @ _base(attention.o_proj).weight
        dao = dbo = da_RH = db_OR = None
        if uo_NR is not None:
            duo_NR = dy_NH @ last[1]
            dout_NO.addmm_(duo_NR, last[0])
            dao, dbo = duo_NR.t() @ out_NO, _rescaled(dy_NH.t() @ uo_NR, adapters[3])
        q_NAD, k_NGD, v_NGD = _heads(qkv_NO, heads, size)
        dout_NAD, out_NAD = (each.unflatten(1, (heads, size)) for each in (dout_NO, out_NO))
        dq, dk, dv = engine.backward(dout_NAD, q_NAD, k_NGD, v_NGD, out_NAD, lse_AN, state, documents, window, scale)
        dqkv_NO = rotate_back(dq, dk, dv, cos_ND, sin_ND)
        del dout_NO, dout_NAD, dq, dk, dv
        num_hidden = x_NH.shape[1]
        dx_NX = dqkv_NO @ qkv.whole_OX
        dnormed_NH = dx_NX[:, :num_hidden]
        if u_NR is not None:
            du_NR = dx_NX[:, qkv.first_rank :][:, : qkv.num_ranks]
            da_RH = du_NR.t() @ normed(x_NH, norm.weight, norm.variance_epsilon)
            db_OR = dqkv_NO.t() @ u_NR
            dnormed_NH = torch.addmm(dnormed_NH, du_NR, a_RH)
        dx_NH = norm_back(x_NH, norm.weight, dnormed_NH, dy_NH, norm.variance_epsilon)
        return dx_NH, None, None, None, None, None, *qkv.slopes(adapters[:3], da_RH, db_OR), dao, dbo


def _heads(qkv_NO: torch.Tensor, heads: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q (N, A, D), k and v (N, G, D) as views."""
    keys = (qkv_NO.shape[1] // size - heads) // 2
    q, k, v = qkv_NO.unflatten(1, (-1, size)).split([heads, keys, keys], dim=1)
    return q, k, v


def _base(module: Any) -> Any:  # Any: a Linear, or PEFT's around one; what it gives, a Linear
    return module.get_base_layer() if isinstance(module, LoraLinear) else module
