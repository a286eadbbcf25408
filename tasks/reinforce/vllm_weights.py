"""Give a colocated vLLM the merged weights of the live adapter, tensor by tensor, and leave the base as it is.

TRL merges the adapter into the base, sends every tensor and takes the adapter out again. In bfloat16 that rounds twice
and moves the frozen base at each step; here base + change is formed in float32 beside it, and only what has an adapter
is sent.

Ring: edge (live tensors).  Not run on a GPU so far: the check of the rollouts (agreement.py) is what vouches for it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, ParamWrapper


def sync_merged_weights(trainer: Any) -> None:  # Any: a GroupTrainer with vLLM
    """Let TRL's vLLM be sent what `merged_parameters` gives."""
    trainer.vllm_generation._iter_named_params = lambda: merged_parameters(trainer.model)


@torch.no_grad()
def merged_parameters(model: Any) -> Iterator[tuple[str, torch.Tensor]]:  # Any: a PeftModel
    """Yield (name in the base, base + change) of every weight with an adapter; formed in float32, rounded once."""
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            stem = module.parameter_name
            weight: Any = module.get_param()  # Any: nn.Module's attributes are untyped
        elif isinstance(module, Linear):
            stem, weight = "weight", module.get_base_layer().weight
        else:
            continue
        (adapter,) = module.active_adapters
        whole = weight.float() + module.get_delta_weight(adapter).float()
        yield f"{base_name(name)}.{stem}", whole.to(weight.dtype)


def base_name(name: str) -> str:
    """Return what a module is called without PEFT around it.

    >>> base_name("base_model.model.model.layers.7.mlp.experts.base_layer")
    'model.layers.7.mlp.experts'
    """
    return name.removeprefix("base_model.model.").replace(".base_layer", "")
