"""Memory and speed of the QLoRA recipe: our own worker, the shapes of Qwen2.5-7B, random weights.

    python tests/bench/bench_qlora_7b.py     one JSON line; also $OUT/qlora_7b.json

Needs a CUDA device, bitsandbytes, and what bench_train_20b.py needs. The recipe is made for 16 GB.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
STEPS, ROW_TOKENS = 8, 1024


def write_base(folder: Path) -> None:
    """Save random bf16 weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.bench.bench_train_20b import write_tokenizer

    config = Qwen2Config(
        num_hidden_layers=28,
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        pad_token_id=1,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="5GB")
    write_tokenizer(folder)


def main() -> None:
    """Make the inputs, run the worker, report."""
    if not Path("/dev/nvidia0").exists():
        sys.stdout.write('{"name": "train-qlora-7b", "skipped": "no CUDA device"}\n')
        return
    import torch

    from tests.bench.bench_train_20b import write_rows

    work = Path(tempfile.mkdtemp(prefix="bench-7b-", dir=os.environ.get("BENCH_DIR")))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.bench.bench_qlora_7b import write_base; "
    code += f"from pathlib import Path; write_base(Path({str(work / 'base')!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    write_rows(work / "packed", ROW_TOKENS, 4 * STEPS, highest=150_000)
    (work / "run").mkdir()
    spec = {
        "lora": {"rank": 64, "alpha": 16, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
        "learning_rate": 2e-4,
        "max_steps": STEPS,
        "save_steps": STEPS,
        "gradient_accumulation": 4,
        "quantization": "nf4",
    }
    plan = {"rows_per_device": 1, "gradient_accumulation": 4, "checkpointing": "full"}
    job = {"folder": str(work / "run"), "spec": spec, "plan": plan, "row_tokens": ROW_TOKENS}
    job |= {"base_folder": str(work / "base"), "packed_folder": str(work / "packed")}
    (work / "run/job.json").write_text(json.dumps(job))
    argv = [sys.executable, "-m", "tasks.train.worker", str(work / "run/job.json")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-1000:] + done.stderr[-3000:])
    records = [json.loads(line) for line in (work / "run/metrics.jsonl").read_text().splitlines()]
    report = {
        "name": "train-qlora-7b",
        "command": "python tests/bench/bench_qlora_7b.py",
        "machine": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "row_tokens": ROW_TOKENS,
        "tokens_per_s": round(statistics.median(record["tokens_per_s"] for record in records[3:])),
        "peak_gpu_gb": round(max(record["peak_gpu_bytes"] for record in records) / 1e9, 2),
        "losses": [round(record["loss"], 4) for record in records],
    }
    text = json.dumps(report)
    sys.stdout.write(text + "\n")
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "qlora_7b.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
