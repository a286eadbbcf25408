"""GRPO on a GPU with transformers' continuous batching, kept, with CUDA graphs: it follows the adapter and resumes.

    python -m pytest --noconftest tests/gpu/test_rollouts.py        with the transformers of pyproject.toml

The CPU twin is tests/tasks/reinforce/test_continuous_rollouts.py.
"""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.small import small_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]
ROOT = Path(__file__).resolve().parents[2]
STEPS, KEPT = 6, 4  # a checkpoint each two steps
LORA = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
SPEC = {
    "lora": LORA,
    "rewards": [
        {"name": "length", "arguments": {"most": 20}},
        {"name": "characters", "arguments": {"pattern": "[1-4]"}},
    ],
    "rollouts": "continuous",
    "quantization": "none",
    "max_sequence_tokens": 256,
    "max_completion_tokens": 64,
    "num_generations": 8,
    "rows_per_device": 16,
    "gradient_accumulation": 2,
    "learning_rate": 1e-2,
    "lr_scheduler": "constant",
    "max_steps": STEPS,
    "save_steps": 2,
}
EXPERTS = {**LORA, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
KINDS = {
    "gpt-oss": {"lora": EXPERTS},
    "gpt-oss, nf4": {"lora": EXPERTS, "quantization": "nf4"},
    "dense": {},
    "nf4": {"quantization": "nf4"},
}


def write_inputs(folder: Path, kind: str) -> dict[str, Any]:
    """A small model that answers with the tokenizer's words only, and questions of unlike lengths."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import GptOssForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from tests.bench.bench_train_20b import write_tokenizer

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 3, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 1, "eos_token_id": 0}
    dense = Qwen2Config(**sizes, **heads)
    model = GptOssForCausalLM(small_config(vocab_size=64)) if "gpt" in kind else Qwen2ForCausalLM(dense)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    draw = np.random.default_rng(0)
    asked = [draw.integers(2, 64, draw.integers(1, 150)).tolist() for _ in range(24)]
    rows = {
        "input_ids": [[*ids, 5, 6] for ids in asked],
        "labels": [[*[-100] * len(ids), 5, 6] for ids in asked],
        "seq_lengths": [[len(ids) + 2] for ids in asked],
    }
    (folder / "packed").mkdir()
    pq.write_table(pa.table(rows), folder / "packed/train.parquet")
    documents = {"row_id": ["0"], "prompt_ids": asked[:1], "answer_ids": [[5, 6]]}
    pq.write_table(pa.table(documents), folder / "packed/validation_documents.parquet")
    return {"base_folder": str(folder / "base"), "packed_folder": str(folder / "packed"), "start_adapter": None}


def learn(inputs: dict[str, Any], folder: Path, kind: str) -> list[dict[str, Any]]:
    """Run the worker to its end; return its metrics."""
    folder.mkdir(exist_ok=True)
    (folder / "job.json").write_text(json.dumps({**inputs, "folder": str(folder), "spec": {**SPEC, **KINDS[kind]}}))
    argv = [sys.executable, "-m", "tasks.reinforce.worker", str(folder / "job.json")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def generations(folder: Path) -> dict[int, list[dict[str, str]]]:
    with (folder / "generations.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    return {step: [row for row in rows if int(row["step"]) == step] for step in range(1, STEPS + 1)}


@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_follow_the_adapter_and_a_run_that_was_killed_samples_the_same(kind: str, tmp_path: Path):
    inputs, whole, again = write_inputs(tmp_path, kind), tmp_path / "whole", tmp_path / "again"
    records = learn(inputs, whole, kind)
    assert len(records) == STEPS
    assert records[-1]["reward"] > records[0]["reward"]
    assert any(record["adapter_share"] is not None for record in records)
    for record in records:
        assert record["ratio_mean"] == pytest.approx(1, abs=0.02), record
        assert record["adapter_share"] is None or record["adapter_share"] > 0.8, record

    shutil.copytree(whole, again)
    for name in (f"checkpoints/checkpoint-{STEPS}", "adapter"):
        shutil.rmtree(again / name)
    (again / "result.json").unlink()
    resumed = learn(inputs, again, kind)
    assert [record["step"] for record in resumed] == list(range(1, STEPS + 1))
    first, second = generations(whole), generations(again)
    assert [len(rows) for rows in second.values()] == [32] * STEPS
    # The same weights and generators, though the engine and its graphs are new. After that step bits may differ: some
    # gradients are summed up in the order in which threads come.
    assert second[KEPT + 1] == first[KEPT + 1]
    assert resumed[KEPT]["reward"] == records[KEPT]["reward"]
    assert resumed[KEPT]["loss"] == pytest.approx(records[KEPT]["loss"], abs=1e-3)
