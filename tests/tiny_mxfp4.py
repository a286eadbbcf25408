"""A base whose experts are stored as those of openai/gpt-oss-* are."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from tasks.gptoss.mxfp4 import QUANTIZATION_CONFIG, quantize


def pack_experts(base: Path, folder: Path) -> None:
    """Store a base's experts in MXFP4, as openai/gpt-oss-* are."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name, weight in weights.items() if weight.ndim == 3]:
        weights[f"{name}_blocks"], weights[f"{name}_scales"] = quantize(
            weights.pop(name).float().transpose(1, 2).contiguous()
        )
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION_CONFIG}))
