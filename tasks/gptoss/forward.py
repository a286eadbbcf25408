"""Put our kernels below transformers' gpt-oss and PEFT's adapters, for training.

The modules, their parameters and PEFT's wrappers stay what they are, so an adapter is saved and
loaded by PEFT as ever; only what they compute in a forward pass is replaced, module by module:

    GptOssExperts, ParamWrapper   factored LoRA on grouped GEMMs       tasks/gptoss/experts.py
    GptOssAttention               flash attention with sinks           tasks/gptoss/attention.py
    GptOssRMSNorm, rotation       one kernel each                      here

Ring: edge (touches a live model).  Shapes: B batch, T tokens, N = B * T, A heads, D head size, H hidden.
"""

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from tasks.gptoss.attention import attend_with_sinks, find_documents
from tasks.gptoss.experts import Place, run_experts
from tasks.gptoss.gate import NUM_PLAIN
from tasks.gptoss.joint import JointAttention, can_join
from tasks.gptoss.norm import normed
from tasks.gptoss.product import Era, Pair, Product, active_adapter, keep_extended
from tasks.gptoss.rotation import rotate_heads
from tasks.gptoss.shelf import Shelf, shelved_layers


def find_decoder(model: nn.Module) -> Any:  # Any: GptOssModel, whose attributes nn.Module doesn't know
    """Return the GptOssModel inside `model`, None for another family."""
    return next((module for module in model.modules() if type(module).__name__ == "GptOssModel"), None)


def factor_experts(
    model: nn.Module,
    *,
    num_recomputed: int = 0,
    num_shelved: int = 0,
    extended_from: int | None = 0,
    era: Era | None = None,
) -> None:
    """Let every expert layer, with or without adapters, run through `run_experts`. PEFT must have wrapped them already.

    Args:
        model: a PeftModel of gpt-oss, or gpt-oss alone.
        num_recomputed: in so many layers, the first ones, save memory for a third more work in the experts.
        num_shelved: in so many layers save the same memory by letting the gate's argument rest in the host's.
        extended_from: hold the weights of this layer and those above it in the layout that the GEMMs want; None where
            something else owns them (FSDP).
        era: says when adapters change; None: they may, before each pass.
    """
    layers, shelf = find_decoder(model).layers, Shelf()
    shelved = shelved_layers(len(layers), lowest_trained(model), num_shelved)
    for number, layer in enumerate(layers):
        outer = layer.mlp.experts
        for module in (outer, _inmost(outer)):  # the latter is what is left when PEFT has taken its own off again
            module.forward = MethodType(_experts_forward, module)
            module.recompute_gate, module.era = number < num_recomputed, era
            module.place = Place(shelf=shelf, layer=number, is_shelved=number in shelved) if shelved else None
        if extended_from is not None and number >= extended_from:
            _extend_weights(outer)


def lowest_trained(model: nn.Module) -> int:
    """Return the number of the lowest layer of which anything is trained, that of all layers when none is."""
    layers = find_decoder(model).layers
    trained = (any(weight.requires_grad for weight in layer.parameters()) for layer in layers)
    return next((number for number, is_trained in enumerate(trained) if is_trained), len(layers))


def _inmost(module: Any) -> Any:  # Any: GptOssExperts, or a ParamWrapper around it
    while isinstance(module, ParamWrapper):
        module = module.base_layer
    return module


@torch.no_grad()
def _extend_weights(module: Any) -> None:  # Any: GptOssExperts, or a ParamWrapper around it
    ranks: dict[str, int] = {}
    while isinstance(module, ParamWrapper):
        ranks[module.parameter_name] = max(module.r.values())
        module = module.base_layer
    for name in ("gate_up_proj", "down_proj"):
        bias = getattr(module, f"{name}_bias")
        setattr(module, f"{name}_extended", keep_extended(getattr(module, name), bias, ranks.get(name, 0)))


def fuse_norms(model: nn.Module) -> None:
    """Let each RMSNorm be one kernel and keep its input only."""
    for module in model.modules():
        if type(module).__name__ == "GptOssRMSNorm":
            module.forward = MethodType(_norm_forward, module)


def flash_attention(model: nn.Module) -> None:
    """Let attention run over packed documents without a mask. Calls must bring position_ids (B, T), no mask, no cache.

    A call may bring `documents`, too: else they are found in the positions, for which a GPU must be waited for.

    A decoder that is handed one mask a kind of layer builds none: they are None, since our attention is told where
    documents begin and needs no mask.
    """
    decoder = find_decoder(model)
    decoder.register_forward_pre_hook(_with_documents, with_kwargs=True)
    for layer in decoder.layers:
        layer.self_attn.forward = MethodType(_attention_forward, layer.self_attn)


def join_layers(model: nn.Module, *, first: int = 0, era: Era | None = None) -> None:
    """Let each frozen layer from `first` on be two steps that keep little, with its adapters in the same GEMMs.

    After `factor_experts` and `flash_attention`. A layer that `can_join` refuses (a dropout, a trained norm, weights of
    4 bits) stays as it is. `era` as for `factor_experts`. The weights of q, k and v become views of one matrix, which
    transformers' `save_pretrained` can't write; PEFT's writes the adapter as ever.
    """
    for layer in find_decoder(model).layers[first:]:
        if can_join(layer):
            layer.joint = JointAttention(layer, era or Era())
            layer.forward = MethodType(_layer_forward, layer)


def _layer_forward(
    self: Any,  # Any: GptOssDecoderLayer
    hidden_states: torch.Tensor,
    *args: Any,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    documents: Any,
    **kwargs: Any,
) -> torch.Tensor:
    del args, kwargs
    norm = self.post_attention_layernorm
    y_NH, x_NH = self.joint(hidden_states.flatten(0, 1), position_embeddings, documents)
    _, weight_NK, index_NK = self.mlp.router(x_NH)

    def remake(made_from_NH: torch.Tensor) -> torch.Tensor:
        return normed(made_from_NH, norm.weight, norm.variance_epsilon)

    out_NH = self.mlp.experts(x_NH, index_NK, weight_NK, residual_NH=y_NH, remake=remake)
    return out_NH.view_as(hidden_states)


def _with_documents(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # Any: torch's hook signature
    if kwargs.get("position_ids") is None or kwargs.get("attention_mask") is not None:
        raise ValueError("packed flash attention takes position_ids and no attention_mask: pack rows without padding")
    masks = dict.fromkeys(decoder.config.layer_types)
    documents = kwargs.get("documents") or find_documents(kwargs["position_ids"])
    return args, {**kwargs, "attention_mask": masks, "documents": documents}


def _attention_forward(
    self: Any,  # Any: GptOssAttention
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    *args: Any,
    documents: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    del args, kwargs
    heads = (-1, self.head_dim)
    q_NAD, k_NGD, v_NGD = (
        project(hidden_states).flatten(0, 1).unflatten(-1, heads) for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    cos_ND, sin_ND = (part.flatten(0, 1) for part in position_embeddings)
    q_NAD, k_NGD = (rotate_heads(part, cos_ND, sin_ND) for part in (q_NAD, k_NGD))
    out_NAD = attend_with_sinks(
        q_NAD, k_NGD, v_NGD, self.sinks, documents, window=self.sliding_window, scale=self.scaling
    )
    return self.o_proj(out_NAD.flatten(1).view(*hidden_states.shape[:2], -1)), None


def _norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:  # Any: GptOssRMSNorm
    x_NH = hidden_states.flatten(0, -2)  # as everywhere else: another number of dimensions is another graph
    return normed(x_NH, self.weight, self.variance_epsilon).view_as(hidden_states)


def _experts_forward(
    self: Any,  # Any: GptOssExperts, or the outermost ParamWrapper around it
    hidden_states: torch.Tensor,
    router_indices: torch.Tensor,
    routing_weights: torch.Tensor,
    **kept: Any,  # Any: `residual_NH` and `remake` of run_experts
) -> torch.Tensor:
    pairs: dict[str, Pair] = {}
    module: Any = self  # Any: as above, one wrapper deeper each time
    while isinstance(module, ParamWrapper):
        pairs |= _active_pair(module)
        module = module.base_layer
    gate_up, down = (_product(module, name, pairs.get(name)) for name in ("gate_up_proj", "down_proj"))
    return run_experts(
        hidden_states.to(gate_up.w_EIO.dtype),
        router_indices,
        routing_weights,
        gate_up,
        down,
        alpha=module.alpha,
        limit=module.limit,
        recompute=self.recompute_gate,
        era=self.era,
        place=self.place,
        **kept,
    )


def _product(module: Any, name: str, pair: Pair | None) -> Product:  # Any: GptOssExperts
    extended = getattr(module, f"{name}_extended", None)
    weight, bias = getattr(module, name), getattr(module, f"{name}_bias")
    if pair is None and extended is not None and extended.whole_EXO.shape[1] > weight.shape[1] + NUM_PLAIN:
        extended = None  # its adapter is switched off just now
    return Product(w_EIO=weight, bias_EO=bias, pair=pair, extended=extended)


def _active_pair(wrapper: ParamWrapper) -> dict[str, Pair]:
    """Return {parameter: pair}; nothing while adapters are switched off."""
    name = active_adapter(wrapper)
    if name is None:
        return {}
    a: Any = wrapper.lora_A[name]  # Any: a Linear in a ModuleDict
    b: Any = wrapper.lora_B[name]  # Any: as above
    num_experts = len(wrapper.get_param())
    return {
        wrapper.parameter_name: Pair(a_PI=a.weight, b_OQ=b.weight, scale=wrapper.scaling[name], num_experts=num_experts)
    }
