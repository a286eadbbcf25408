"""PEFT's own word on an adapter: which parameters it changes, and sampled blocks of each delta.

    python -m tasks.merge.worker job.json      job: {"adapter": folder, "base": folder, "result": file}

The base is built on the meta device, so no weight of it is read. PEFT itself puts the adapter's layers on it: names,
nesting, ranks and scales are its own. Then each layer is cut down to the block that `sample.py` chooses, and
PEFT's `get_delta_weight` computes it: a few kilobytes instead of 2 GB.

Ring: edge (transformers, PEFT); its own process, for they cost 250 MB and three seconds.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.merge.sample import Sample, choose_sample

_PREFIX = "base_model.model."


def peft_deltas(adapter: Path, base: Path) -> dict[str, torch.Tensor]:
    """Return parameter name -> sampled block of PEFT's delta, for every parameter that the adapter changes."""
    sys.modules["bitsandbytes"] = None  # pyright: ignore[reportArgumentType]  # 2 of PEFT's 5 s; nothing here needs it
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    base_config = AutoConfig.from_pretrained(str(base))
    vars(base_config).pop("quantization_config", None)  # the adapter was trained on the unpacked parameters
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(base_config)
    model = get_peft_model(skeleton, LoraConfig.from_pretrained(str(adapter)), low_cpu_mem_usage=True)
    deltas: dict[str, torch.Tensor] = {}
    with safe_open(str(adapter / "adapter_model.safetensors"), framework="pt") as stored:
        for module, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                part = str(layer.parameter_name) if isinstance(layer, ParamWrapper) else "weight"
                name = f"{module.removeprefix(_PREFIX).replace('.base_layer', '')}.{part}"
                deltas[name] = _delta(layer, name, part, module, stored)
    return deltas


def _delta(layer: Any, name: str, part: str, module: str, stored: Any) -> torch.Tensor:
    # Any: LoraLayer's attributes are made at run time; safe_open is untyped
    parameter = getattr(layer.get_base_layer(), part)
    shape = tuple(parameter.shape)
    sample = choose_sample(name, shape)
    a, b = (stored.get_tensor(f"{module}.lora_{side}.weight").float() for side in "AB")
    a, b = _cut(a, b, sample, len(shape) == 3, shape[0])
    if hasattr(layer, "parameter_name"):  # a ParamWrapper, which reads sizes and type of its parameter
        block = torch.empty(*((len(sample.experts),) if sample.experts else ()), b.shape[0], a.shape[1])
        layer.get_base_layer().register_parameter(part, torch.nn.Parameter(block))
        layer.num_experts = len(sample.experts) or 1
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = torch.nn.Parameter(a), torch.nn.Parameter(b)
    return layer.get_delta_weight("default").detach().contiguous()


def _cut(
    a: torch.Tensor, b: torch.Tensor, sample: Sample, is_expert: bool, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep of a pair what belongs to the sampled experts, rows and columns."""
    if not is_expert:
        return a[:, sample.columns], b[sample.rows]
    a = a.reshape(num_experts, -1, a.shape[-1])[list(sample.experts)].flatten(0, 1)
    b = b.reshape(b.shape[0], -1, num_experts)[:, :, list(sample.experts)].flatten(1)
    return a[:, sample.rows], b[sample.columns]


def main() -> None:
    """Answer one job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    unfinished = Path(f"{job['result']}.{os.getpid()}.tmp")
    save_file(peft_deltas(Path(job["adapter"]), Path(job["base"])), unfinished)
    unfinished.replace(job["result"])


if __name__ == "__main__":
    main()
