"""On a GPU: layers that rest on the host change no bit of a run, and their bytes are not on the GPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_mxfp4 import pack_experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]
ROOT = Path(__file__).resolve().parents[2]
STEPS, ROW_TOKENS, LAYERS = 4, 512, 8
DENSE = {"target_modules": [f"{LAYERS - 1}.self_attn.{name}" for name in ("q_proj", "v_proj")]}
EXPERTS = {"target_parameters": [f"{LAYERS - 1}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]}


def save_base(folder: Path, family: str) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from tests.bench.bench_train_20b import write_tokenizer

    sizes = {"num_hidden_layers": LAYERS, "vocab_size": 1024, "pad_token_id": 1, "eos_token_id": 0}
    torch.manual_seed(0)
    if family == "dense":
        config: Any = Qwen2Config(
            **sizes, hidden_size=2048, intermediate_size=8192, num_attention_heads=16, num_key_value_heads=4
        )
        model: Any = Qwen2ForCausalLM(config)
    else:
        config = GptOssConfig(
            **sizes,
            num_local_experts=8,
            num_experts_per_tok=2,
            hidden_size=512,
            intermediate_size=1024,
            head_dim=64,
            num_attention_heads=8,
            num_key_value_heads=2,
            sliding_window=128,
        )
        model = GptOssForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.bench.bench_train_20b import write_rows

    folder = tmp_path_factory.mktemp("inputs")
    save_base(folder / "dense", "dense")
    save_base(folder / "experts", "experts")
    pack_experts(folder / "experts", folder / "mxfp4")
    write_rows(folder / "packed", ROW_TOKENS, 4 * STEPS, highest=1024)
    return folder


def train(inputs: Path, folder: Path, family: str, num_offloaded: int, **changes: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    lora = {"rank": 4, "alpha": 8, **(DENSE if family == "dense" else EXPERTS)}
    plan = {"rows_per_device": 2, "gradient_accumulation": 2, "num_offloaded": num_offloaded}
    job = {
        "folder": str(folder),
        "spec": {"lora": lora, "learning_rate": 5e-3, "max_steps": STEPS, "save_steps": 2, **changes},
        "plan": {**plan, "checkpointing": "full" if family == "dense" else "none"},
        "base_folder": str(inputs / family),
        "packed_folder": str(inputs / "packed"),
        "row_tokens": ROW_TOKENS,
    }
    (folder / "job.json").write_text(json.dumps(job))
    argv = [sys.executable, "-m", "tasks.train.worker", str(folder / "job.json")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout[-500:] + done.stderr)[-3000:]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [record["loss"] for record in records],
        "peak": max(record["peak_gpu_bytes"] for record in records),
        "said": done.stdout,
        "adapter": load_file(folder / "adapter/adapter_model.safetensors"),
    }


@pytest.mark.parametrize(
    ("family", "changes", "layer_bytes"),
    [
        ("dense", {"quantization": "nf4"}, 0.5 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192)),
        ("dense", {}, 2 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192)),
        ("experts", {}, 2 * 8 * 3 * 512 * 1024),
        ("experts", {"kernels": "stock", "attention": "eager"}, 2 * 8 * 3 * 512 * 1024),
        ("mxfp4", {}, 2 * 8 * 3 * 512 * 1024),
    ],
)
def test_to_the_bit_and_off_the_gpu(
    inputs: Path, tmp_path: Path, family: str, changes: dict[str, Any], layer_bytes: float
):
    changes = {"deterministic": True, **changes}
    whole = train(inputs, tmp_path / "whole", family, 0, **changes)
    resting = train(inputs, tmp_path / "resting", family, LAYERS - 1, **changes)
    assert f"{LAYERS - 1} layers rest in the host's memory" in resting["said"] and ", pinned" in resting["said"]
    assert resting["losses"] == whole["losses"]
    assert all(torch.equal(tensor, resting["adapter"][name]) for name, tensor in whole["adapter"].items())
    assert whole["peak"] - resting["peak"] > (LAYERS - 1 - 3) * layer_bytes  # two in passage, and fragments
