"""The attention half of a frozen gpt-oss layer with its adapters, as one step that keeps little.

    x -> x + o(attention(rotate(q, k, v of norm(x))))

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
from torch.nn.functional import pad

from tasks.gptoss.attention import Documents, forward_of
from tasks.gptoss.fused import fused
from tasks.gptoss.gate import NUM_PLAIN
from tasks.gptoss.norm import norm_back, norm_wide, normed
from tasks.gptoss.product import round_up, scaled
from tasks.gptoss.rotation import rotate, rotate_back


def can_join(layer: Any) -> bool:  # Any: GptOssDecoderLayer
    """Say whether a layer is what this module computes: frozen, with plain adapters or none on its projections."""
    attention = layer.self_attn
    frozen = (attention.sinks, layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return not any(weight.requires_grad for weight in frozen) and all(
        _is_plain(getattr(attention, name)) for name in names
    )


def _is_plain(module: nn.Module) -> bool:
    if isinstance(module, LoraLinear):
        dropouts = [each for each in module.lora_dropout.values() if not isinstance(each, nn.Identity)]
        biased = any(half.bias is not None for half in module.lora_B.values())
        if dropouts or biased or module.lora_variant or module.fan_in_fan_out or len(module.lora_A) != 1:
            return False
        module = module.get_base_layer()
    return type(module) is nn.Linear and module.bias is not None and not module.weight.requires_grad


@dataclass(frozen=True, slots=True, kw_only=True)
class _Half:
    """One projection: its frozen layer, and where its outputs and its ranks lie among those it is joined with."""

    module: Any  # Any: a Linear, or PEFT's around one
    outputs: slice
    ranks: slice

    @property
    def adapter(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """A (R, I), B (O, R) and the scale; None while there is none, or it is switched off."""
        module = self.module
        if not isinstance(module, LoraLinear) or module.disable_adapters or module.merged:
            return None
        (name,) = module.active_adapters
        a: Any = module.lora_A[name]  # Any: a Linear in a ModuleDict
        b: Any = module.lora_B[name]  # Any: as above
        return a.weight, b.weight, module.scaling[name]


class Joined:
    """Linear layers that read the same input, side by side as one matrix [W | bias | B] (O, I + X)."""

    def __init__(self, modules: Sequence[Any]) -> None:  # Any: Linear, or PEFT's around one
        """Move the layers' weights into the matrix; their parameters stay as views of it."""
        self.halves: list[_Half] = []
        num_outputs = num_ranks = 0
        bases = [_base(module) for module in modules]
        for module, base in zip(modules, bases, strict=True):
            rank: int = max(module.r.values()) if isinstance(module, LoraLinear) else 0
            outputs = slice(num_outputs, num_outputs + base.out_features)
            self.halves.append(_Half(module=module, outputs=outputs, ranks=slice(num_ranks, num_ranks + rank)))
            num_outputs, num_ranks = outputs.stop, num_ranks + rank
        self.num_inputs, self.num_ranks = bases[0].in_features, num_ranks
        self.whole_OX = bases[0].weight.new_zeros(num_outputs, self.num_inputs + NUM_PLAIN + round_up(num_ranks))
        for half, base in zip(self.halves, bases, strict=True):
            self.whole_OX[half.outputs, : self.num_inputs] = base.weight.data
            self.whole_OX[half.outputs, self.num_inputs] = base.bias.data
            base.weight.data = self.whole_OX[half.outputs, : self.num_inputs]

    @property
    def first_rank(self) -> int:
        """The column where B begins."""
        return self.num_inputs + NUM_PLAIN

    def adapters(self) -> list[torch.Tensor | None]:
        """Return A and B of each layer, None where there is none."""
        return [each for half in self.halves for each in (half.adapter or (None, None, 0.0))[:2]]

    @torch.no_grad()
    def stack(self) -> torch.Tensor | None:
        """Write today's B and return scale * A of all (R, I), in the weights' dtype; None without any."""
        parts = []
        for half in self.halves:
            size = half.ranks.stop - half.ranks.start
            if half.adapter is None:
                parts.append(self.whole_OX.new_zeros(size, self.num_inputs))
                continue
            a_RI, b_OR, scale = half.adapter
            parts.append(scaled(a_RI, scale, self.whole_OX.dtype))
            self.whole_OX[half.outputs, self.first_rank :][:, half.ranks].copy_(b_OR)
        is_used = any(half.adapter is not None for half in self.halves)
        return torch.cat(parts) if is_used else None

    def slopes(self, da_RI: torch.Tensor | None, db_OR: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Return the gradient of each of `adapters`, from those of scale * A and of all columns of B."""
        found: list[torch.Tensor | None] = []
        for half in self.halves:
            if half.adapter is None or da_RI is None or db_OR is None:
                found += [None, None]
                continue
            a_RI, b_OR, scale = half.adapter
            found += [scaled(da_RI[half.ranks], scale, a_RI.dtype), db_OR[half.outputs, half.ranks].to(b_OR.dtype)]
        return found


class JointAttention:
    """The attention half of one layer, with the weights of q, k and v side by side."""

    def __init__(self, layer: Any) -> None:  # Any: GptOssDecoderLayer
        """Take a layer that `can_join`."""
        attention = layer.self_attn
        self.attention, self.norm = attention, layer.input_layernorm
        self.qkv = Joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o = _Half(module=attention.o_proj, outputs=slice(None), ranks=slice(None))

    def __call__(
        self, x_NH: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], documents: Documents
    ) -> torch.Tensor:
        """Return x + attention (N, H)."""
        cos_ND, sin_ND = (part.flatten(0, 1) for part in position_embeddings)
        adapters = [*self.qkv.adapters(), *(self.o.adapter or (None, None))[:2]]
        return _Attend.apply(x_NH, self, documents, cos_ND, sin_ND, *adapters)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # Any: torch's context
        x_NH: torch.Tensor,
        joint: JointAttention,
        documents: Documents,
        cos_ND: torch.Tensor,
        sin_ND: torch.Tensor,
        *adapters: torch.Tensor | None,
    ) -> torch.Tensor:
        del adapters  # read where they lie
        attention, qkv, norm = joint.attention, joint.qkv, joint.norm
        heads, size = attention.q_proj.out_features // attention.head_dim, attention.head_dim
        a_RH = qkv.stack()
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
        y_NH = torch.addmm(x_NH, out_NO, base.weight.t())
        uo_NR = ao_RO = None
        if joint.o.adapter is None:
            y_NH += base.bias
        else:
            a_RO, b_HR, o_scale = joint.o.adapter
            ao_RO = scaled(a_RO, o_scale, out_NO.dtype)
            uo_NR = out_NO @ ao_RO.t()
            y_NH.addmm_(_with_one(uo_NR), _with_bias(b_HR, base.bias, uo_NR.dtype).t())
        ctx.rest = joint, documents, engine, window, scale, heads, size
        ctx.save_for_backward(x_NH, qkv_NO, out_NO, lse_AN, cos_ND, sin_ND, u_NR, a_RH, uo_NR, ao_RO, *state)
        return y_NH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:  # Any: torch's context; tensors or None
        joint, documents, engine, window, scale, heads, size = ctx.rest
        x_NH, qkv_NO, out_NO, lse_AN, cos_ND, sin_ND, u_NR, a_RH, uo_NR, ao_RO, *state = ctx.saved_tensors
        attention, qkv, norm = joint.attention, joint.qkv, joint.norm
        dy_NH = grads[0].contiguous()
        dout_NO = dy_NH @ _base(attention.o_proj).weight
        dao = dbo = None
        if uo_NR is not None:
            a_RO, b_HR, o_scale = joint.o.adapter
            duo_NR = dy_NH @ b_HR.to(dy_NH.dtype)
            dout_NO.addmm_(duo_NR, ao_RO)
            dao = scaled(duo_NR.t() @ out_NO, o_scale, a_RO.dtype)
            dbo = (dy_NH.t() @ uo_NR).to(b_HR.dtype)
        q_NAD, k_NGD, v_NGD = _heads(qkv_NO, heads, size)
        dout_NAD, out_NAD = (each.unflatten(1, (heads, size)) for each in (dout_NO, out_NO))
        dq, dk, dv = engine.backward(dout_NAD, q_NAD, k_NGD, v_NGD, out_NAD, lse_AN, state, documents, window, scale)
        del dout_NO, dout_NAD
        dqkv_NO = rotate_back(dq, dk, dv, cos_ND, sin_ND)
        del dq, dk, dv
        da_RH = db_OR = None
        num_hidden = x_NH.shape[1]
        if not ctx.needs_input_grad[0] and u_NR is None:
            return (None,) * (5 + 2 * len(qkv.halves)) + (dao, dbo)
        dx_NX = dqkv_NO @ qkv.whole_OX
        dnormed_NH = dx_NX[:, :num_hidden]
        if u_NR is not None:
            du_NR = dx_NX[:, qkv.first_rank :][:, : qkv.num_ranks]
            da_RH = du_NR.t() @ normed(x_NH, norm.weight, norm.variance_epsilon)
            db_OR = dqkv_NO.t() @ u_NR
            dnormed_NH = torch.addmm(dnormed_NH, du_NR, a_RH)
        dx_NH = norm_back(x_NH, norm.weight, dnormed_NH, dy_NH, norm.variance_epsilon)
        return dx_NH, None, None, None, None, *qkv.slopes(da_RH, db_OR), dao, dbo


def _heads(qkv_NO: torch.Tensor, heads: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q (N, A, D), k and v (N, G, D) as views."""
    keys = (qkv_NO.shape[1] // size - heads) // 2
    q, k, v = qkv_NO.unflatten(1, (-1, size)).split([heads, keys, keys], dim=1)
    return q, k, v


def _base(module: Any) -> Any:  # Any: a Linear, or PEFT's around one; what it gives, a Linear
    return module.get_base_layer() if isinstance(module, LoraLinear) else module


@fused
def _with_one(u_NR: torch.Tensor) -> torch.Tensor:
    """Return [u | 1 | 0], its width a multiple of 8."""
    more = round_up(u_NR.shape[1] + 1) - u_NR.shape[1]
    return torch.cat((u_NR, pad(u_NR.new_ones(len(u_NR), 1), (0, more - 1))), dim=1)


@fused
def _with_bias(b_HR: torch.Tensor, bias_H: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return [B | bias | 0] to match."""
    more = round_up(b_HR.shape[1] + 1) - b_HR.shape[1]
    return torch.cat((b_HR.to(dtype), pad(bias_H[:, None].to(dtype), (0, more - 1))), dim=1)
