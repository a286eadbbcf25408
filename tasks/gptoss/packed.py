"""A gpt-oss base in MXFP4 whose lowest layers keep their experts as they are stored: 17 bytes for 32 weights.

    folder -> load_packed(folder, n) -> GptOssForCausalLM on the host; layers 0 .. n-1: `packed` experts and stand-ins

What owns the layers (tasks/train/offload.py) unpacks one as it passes: transformers unpacks all as it loads, which for
gpt-oss-120b is 234 GB of memory and of traffic instead of 65.

Ring: edge (disk, transformers).
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, GptOssForCausalLM, PreTrainedModel

from tasks import files
from tasks.gptoss.layout import EXPERT_PARAMETERS, quantized_stem
from tasks.gptoss.mxfp4 import BLOCK_VALUES, unpack


def load_packed(folder: Path, num_packed: int, *, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a base on the host: the experts of its lowest `num_packed` layers stay packed, the others are unpacked.

    A packed parameter is a stand-in that takes no memory; its module's `packed` has what it stands for, as pages of the
    files: name -> (blocks (E, O, I/32, 16), scales (E, O, I/32)).
    Raises: what safetensors raises for a file that is not whole.
    """
    resting = {f"model.layers.{layer}.mlp.experts.{name}" for layer in range(num_packed) for name in EXPERT_PARAMETERS}
    weights: dict[str, torch.Tensor] = {}
    packed: dict[str, dict[str, torch.Tensor]] = {}
    for shard in files.weight_files(folder):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                found = quantized_stem(name)
                if found is None:
                    weights[name] = file.get_tensor(name).to(dtype)
                else:
                    packed.setdefault(found[0], {})[found[1]] = file.get_tensor(name)
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, parts in packed.items():
        blocks, scales = parts["blocks"], parts["scales"]
        if name in resting:
            num_experts, outputs, groups, _ = blocks.shape
            weights[name] = stand_in(torch.Size((num_experts, groups * BLOCK_VALUES, outputs)), dtype)
            kept[name] = blocks, scales
        else:
            weights[name] = unpack(blocks, scales, dtype)
    config: Any = AutoConfig.from_pretrained(folder)  # Any: the stubs lack what config.json brings
    del config.quantization_config
    model: Any = GptOssForCausalLM.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, attn_implementation=attention
    )
    model.name_or_path = model.config._name_or_path = str(folder)  # adapters say what they were trained on
    for layer, module in enumerate(model.model.layers[:num_packed]):
        prefix = f"model.layers.{layer}.mlp.experts."
        vars(module.mlp.experts)["packed"] = {
            name: kept[prefix + name] for name in EXPERT_PARAMETERS if prefix + name in kept
        }
    return model


def stand_in(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of zeros that takes the memory of one."""
    return torch.zeros(1, dtype=dtype).expand(shape)
