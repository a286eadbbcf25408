"""Bases and adapters to merge: random weights in gpt-oss's names and shapes, adapters whose keys PEFT itself chose."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import GptOssConfig, GptOssForCausalLM

from tasks import files
from tasks.gptoss.layout import EXPERT_PARAMETERS, config_values, parameter_shapes
from tasks.gptoss.mxfp4 import QUANTIZATION_CONFIG, quantize
from tasks.merge.plan import plan_merge
from tasks.merge.reader import Reader
from tasks.merge.run import write_model, write_side_files
from tasks.specs import GptOssShape, MergeSpec

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def write_base(
    folder: Path, shape: GptOssShape, dtype: torch.dtype = torch.bfloat16, shard_bytes: int = 10**9, mxfp4: bool = False
) -> Path:
    """Write random weights and a config; with `mxfp4` the experts as blocks and scales, like openai/gpt-oss-20b."""
    torch.manual_seed(0)
    config = GptOssConfig(**config_values(shape), eos_token_id=257, pad_token_id=261)
    config.save_pretrained(folder)
    if mxfp4:
        stored = files.read_json(folder / "config.json") | {"quantization_config": QUANTIZATION_CONFIG}
        files.write_json(folder / "config.json", stored)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, size in parameter_shapes(shape).items():
        values = torch.randn(size) * 0.02 + (1.0 if "norm" in name else 0.0)
        made = {name: values.to(dtype)}
        if mxfp4 and name.endswith(EXPERT_PARAMETERS):
            blocks, scales = quantize(values.transpose(-1, -2).contiguous())
            made = {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales.contiguous()}
        if sum(tensor.nbytes for tensor in (shards[-1] | made).values()) > shard_bytes:
            shards.append({})
        shards[-1] |= made
    save_shards(folder, shards)
    return folder


def save_shards(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    """Write shards and their index as transformers names them."""
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    files.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def stream(
    base: Path, adapter: Path, target: Path, **spec: Any
) -> dict[str, Any]:  # Any: MergeSpec's fields; JSON values
    """Merge without asking PEFT, which costs seconds, for tests that compare with it themselves; return the ledger."""
    given = MergeSpec.model_validate(spec)
    with Reader.opened(base) as opened, Reader.opened(adapter) as deltas:
        config = files.read_json(adapter / "adapter_config.json")
        stored = {"bfloat16": "BF16", "float32": "F32"}[given.dtype]
        plan = plan_merge(
            opened.headers, deltas.headers, config, dtype=stored, experts=given.experts, shard_bytes=given.shard_bytes
        )
        target.mkdir(parents=True, exist_ok=True)
        ledger = write_model(plan, opened, deltas, target)
    write_side_files(base, files.read_json(base / "config.json"), target, given)
    return ledger


def write_adapter(folder: Path, shape: GptOssShape, size: float = 0.1, **config: Any) -> Path:  # Any: LoraConfig's
    """Write a random adapter as PEFT would save it; `config` are LoraConfig's arguments."""
    given = LoraConfig(**{"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **config})
    with torch.device("meta"):
        skeleton = GptOssForCausalLM(GptOssConfig(**config_values(shape)))
    model = get_peft_model(skeleton, given, low_cpu_mem_usage=True)
    torch.manual_seed(1)
    state = get_peft_model_state_dict(model)
    tensors = {name: torch.randn(value.shape) * size for name, value in state.items()}
    given.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
