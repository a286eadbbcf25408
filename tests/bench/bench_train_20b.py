"""The gpt-oss-20b recipe on one GPU: our own worker, true shapes, random weights.

    python tests/bench/bench_train_20b.py [num_layers]     prints one JSON line; $OUT/train_20b.json when OUT is set

Runs tasks.train.worker exactly as the flow does (TRL, PEFT, checkpoints, evaluation) on a folder of
random bf16 weights in the shapes of openai/gpt-oss-20b, with packed rows of random tokens. Needs a CUDA
device with 80 GB, torch, transformers, peft, trl and datasets; no Prefect, no network.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
ROW_TOKENS, NUM_ROWS, STEPS = 4096, 40, 8


def write_base(folder: Path, num_layers: int) -> float:
    """Save random weights; return the seconds it took."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast

    start = time.perf_counter()
    config = GptOssConfig(
        num_hidden_layers=num_layers,
        num_local_experts=32,
        num_experts_per_tok=4,
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        head_dim=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        sliding_window=128,
        pad_token_id=1,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = GptOssForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="5GB")
    words = {"<eos>": 0, "<pad>": 1, **{str(index): index for index in range(2, 64)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return time.perf_counter() - start


def write_rows(folder: Path) -> None:
    """Write packed rows of four random documents each."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = np.random.default_rng(0)
    for name, count in (("train", NUM_ROWS), ("validation", 2)):
        ids = [draw.integers(1000, 200000, ROW_TOKENS).tolist() for _ in range(count)]
        lengths = [[ROW_TOKENS // 4] * 4] * count
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"input_ids": ids, "labels": ids, "seq_lengths": lengths}), folder / f"{name}.parquet")


def main() -> None:
    """Make the inputs, run the worker, report."""
    if not Path("/dev/nvidia0").exists():
        sys.stdout.write('{"name": "train-gptoss20b-lora-h100-recipe", "skipped": "no CUDA device"}\n')
        return
    num_layers = int(sys.argv[1]) if len(sys.argv) > 1 else 24
    work = Path(tempfile.mkdtemp(prefix="bench-20b-", dir=os.environ.get("BENCH_DIR")))
    # The parent must leave the GPU before the worker takes it: inputs are made in a child.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.bench.bench_train_20b import write_base; "
    code += f"from pathlib import Path; print(write_base(Path({str(work / 'base')!r}), {num_layers}))"
    saved = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    write_rows(work / "packed")
    layers = [layer for layer in (7, 15, 23) if layer < num_layers]
    spec = {
        "lora": {"rank": 8, "alpha": 16, "target_parameters": [f"{n}.mlp.experts.down_proj" for n in layers]},
        "learning_rate": 2e-4,
        "max_steps": STEPS,
        "rows_per_device": 1,
        "gradient_accumulation": 4,
        "save_steps": STEPS,
    }
    job = {
        "folder": str(work / "run"),
        "spec": spec,
        "base_folder": str(work / "base"),
        "packed_folder": str(work / "packed"),
        "row_tokens": ROW_TOKENS,
    }
    (work / "run").mkdir()
    (work / "run/job.json").write_text(json.dumps(job))
    start = time.perf_counter()
    argv = [sys.executable, "-m", "tasks.train.worker", str(work / "run/job.json")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-6000:])
    records = [json.loads(line) for line in (work / "run/metrics.jsonl").read_text().splitlines()]
    speeds = [record["tokens_per_s"] for record in records[2:]]
    result = json.loads((work / "run/result.json").read_text())
    import torch

    report = {
        "name": "train-gptoss20b-lora-h100-recipe",
        "command": "python tests/bench/bench_train_20b.py",
        "machine": torch.cuda.get_device_name(0),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "num_layers": num_layers,
        "row_tokens": ROW_TOKENS,
        "tokens_per_step": 4 * ROW_TOKENS,
        "num_trainable": result["num_trainable"],
        "tokens_per_s": round(statistics.median(speeds)),
        "spread_pct": round(100 * (max(speeds) - min(speeds)) / statistics.median(speeds), 1),
        "peak_gpu_gb": round(max(record["peak_gpu_bytes"] for record in records) / 1e9, 1),
        "first_loss": round(result["first_loss"], 4),
        "last_loss": round(result["last_loss"], 4),
        "save_base_s": round(float(saved.stdout.split()[-1]), 1),
        "worker_s": round(time.perf_counter() - start, 1),
    }
    text = json.dumps(report)
    sys.stdout.write(text + "\n")
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "train_20b.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
