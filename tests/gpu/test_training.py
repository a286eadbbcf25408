"""The real worker on a GPU: resumed is uninterrupted, in deterministic mode to the bit; ours learns what stock does."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.gpu.small import small_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]
ROOT = Path(__file__).resolve().parents[2]
STEPS, ROW_TOKENS = 8, 512
LORA = {
    "rank": 4,
    "alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
SPEC = {"lora": LORA, "learning_rate": 5e-3, "max_steps": STEPS, "save_steps": 4, "rows_per_device": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small gpt-oss and rows of three documents of a language that can be learnt."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer, models
    from transformers import GptOssForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    GptOssForCausalLM(small_config(num_hidden_layers=4)).to(torch.bfloat16).save_pretrained(folder / "base")
    words = {"<eos>": 0, "<pad>": 1, **{str(index): index for index in range(2, 64)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(
        folder / "base"
    )
    draw = np.random.default_rng(0)
    (folder / "packed").mkdir()
    for name, count in (("train", STEPS * 2), ("validation", 2)):
        ids = [(np.arange(ROW_TOKENS) * 7 + draw.integers(900)) % 1000 + 2 for _ in range(count)]
        table = {"input_ids": ids, "labels": ids, "seq_lengths": [[200, 200, 112]] * count}
        pq.write_table(pa.table(table), folder / f"packed/{name}.parquet")
    return folder


def train(inputs: Path, folder: Path, **changes: Any) -> list[float]:
    folder.mkdir(exist_ok=True)
    plan = {"rows_per_device": 2, "gradient_accumulation": 1, "checkpointing": "none", "num_recomputed": 0}
    plan |= changes.pop("plan", {})
    job = {
        "folder": str(folder),
        "spec": {**SPEC, **changes},
        "plan": plan,
        "base_folder": str(inputs / "base"),
        "packed_folder": str(inputs / "packed"),
        "row_tokens": ROW_TOKENS,
    }
    (folder / "job.json").write_text(json.dumps(job))
    argv = [sys.executable, "-m", "tasks.train.worker", str(folder / "job.json")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter/adapter_model.safetensors")


def resume_half_way(inputs: Path, whole: Path, folder: Path, **changes: Any) -> list[float]:
    """What a kill after the first checkpoint leaves, gone on with."""
    shutil.copytree(whole, folder)
    for name in (f"checkpoints/checkpoint-{STEPS}", "adapter"):
        shutil.rmtree(folder / name)
    (folder / "result.json").unlink()
    return train(inputs, folder, **changes)


def test_resumed_is_uninterrupted_to_the_bit_in_deterministic_mode(inputs: Path, tmp_path: Path):
    whole = train(inputs, tmp_path / "whole", deterministic=True)
    resumed = resume_half_way(inputs, tmp_path / "whole", tmp_path / "resumed", deterministic=True)
    assert resumed == whole and whole[-1] < whole[0] - 0.1
    first, second = adapter(tmp_path / "whole"), adapter(tmp_path / "resumed")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_resumed_is_uninterrupted_within_rounding(inputs: Path, tmp_path: Path):
    whole = train(inputs, tmp_path / "whole")
    resumed = resume_half_way(inputs, tmp_path / "whole", tmp_path / "resumed")
    assert resumed == pytest.approx(whole, rel=2e-3)


@pytest.mark.parametrize(
    "plan",
    [
        {"checkpointing": "selective", "num_recomputed": 4},
        {"checkpointing": "offload", "num_shelved": 2},
        {"checkpointing": "full"},
        {"rows_per_device": 1, "gradient_accumulation": 2},
    ],
    ids=["selective", "offload", "full", "1 row"],
)
def test_every_plan_is_the_same_run(inputs: Path, tmp_path: Path, plan: dict[str, Any]):
    whole = train(inputs, tmp_path / "whole")
    assert train(inputs, tmp_path / "other", plan=plan) == pytest.approx(whole, rel=5e-3)


def test_our_kernels_learn_what_stock_learns(inputs: Path, tmp_path: Path):
    ours = train(inputs, tmp_path / "ours")
    stock = train(inputs, tmp_path / "stock", kernels="stock", attention="eager", plan={"checkpointing": "full"})
    assert ours == pytest.approx(stock, rel=1e-2)
