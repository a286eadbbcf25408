"""A GPU that another process fills after the memory was looked at: smaller passes, the same run."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tasks.artifacts import ArtifactStore, BaseCheckpoint, PackedDataset, TrainedAdapter
from tasks.specs import LoraSpec, TrainSpec
from tasks.train.run import train_adapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]
ROW_TOKENS, ROWS, STEPS = 4096, 32, 3
LEFT_GB = 7  # the whole batch at once needs about twice as much
SPEC = TrainSpec(
    lora=LoraSpec(rank=4, alpha=8, target_parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
    learning_rate=1e-3,
    max_steps=STEPS,
    save_steps=STEPS,
    rows_per_device=ROWS,
    gradient_accumulation=1,
)
_HOG = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
taken = torch.empty(free - int(float(sys.argv[1]) * 1e9), dtype=torch.uint8, device="cuda")
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[PackedDataset, BaseCheckpoint]:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import GptOssConfig, GptOssForCausalLM

    from tests.bench.bench_train_20b import write_tokenizer

    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 512, "vocab_size": 1024}
    heads = {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "sliding_window": 128}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 4}
    config = GptOssConfig(**sizes, **heads, **experts, pad_token_id=1, eos_token_id=0)
    model = GptOssForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    draw = np.random.default_rng(0)
    (folder / "packed").mkdir()
    for name, count in (("train", ROWS * STEPS), ("validation", 2)):
        ids = [(np.arange(ROW_TOKENS) * 7 + draw.integers(900)) % 1000 + 2 for _ in range(count)]
        table = {"input_ids": ids, "labels": ids, "seq_lengths": [[ROW_TOKENS]] * count}
        pq.write_table(pa.table(table), folder / f"packed/{name}.parquet")
    counts = {"num_train_rows": ROWS * STEPS, "num_validation_rows": 2, "num_train_documents": ROWS * STEPS}
    tokens = {"num_train_tokens": ROWS * STEPS * ROW_TOKENS, "num_learnt_tokens": ROWS * STEPS * ROW_TOKENS}
    packed = PackedDataset(
        key="0" * 16, folder=str(folder / "packed"), parents=(), row_tokens=ROW_TOKENS, **counts,
        num_validation_documents=2, **tokens, fill_pct=100.0,
    )  # fmt: skip
    base = BaseCheckpoint(
        key="1" * 16, folder=str(folder), parents=(), model_folder=str(folder / "base"), origin="random",
        model_digest="2" * 64, num_parameters=model.num_parameters(),
    )  # fmt: skip
    return packed, base


@contextmanager
def filled_once_it_starts(home: Path) -> Iterator[None]:
    """Take all but LEFT_GB of the GPU as soon as a trainer was started below `home`."""
    hogs: list[subprocess.Popen[bytes]] = []

    def fill() -> None:
        while not list(home.rglob("process.json")):
            time.sleep(0.05)
        hogs.append(
            subprocess.Popen([sys.executable, "-c", _HOG, str(LEFT_GB)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def losses(adapter: TrainedAdapter) -> list[float]:
    return [json.loads(line)["loss"] for line in (adapter.path / "metrics.jsonl").read_text().splitlines()]


def test_smaller_passes_are_the_same_run(inputs: tuple[PackedDataset, BaseCheckpoint], tmp_path: Path):
    with filled_once_it_starts(tmp_path / "full"):
        short = train_adapter(*inputs, SPEC, ArtifactStore(tmp_path / "full"), lambda record: None)
    whole = train_adapter(*inputs, SPEC, ArtifactStore(tmp_path / "free"), lambda record: None)
    plans = [json.loads((each.path / "plans.json").read_text()) for each in (short, whole)]
    assert [plan["rows_per_device"] for plan in plans[1]] == [ROWS]
    assert len(plans[0]) > 1, plans[0]
    assert all(plan["rows_per_device"] * plan["gradient_accumulation"] == ROWS for plan in plans[0])
    assert plans[0][-1]["rows_per_device"] < ROWS
    assert losses(short) == pytest.approx(losses(whole), abs=2e-2)
