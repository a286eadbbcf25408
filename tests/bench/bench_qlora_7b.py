"""Memory and speed of the QLoRA recipe: our own worker, the shapes of Qwen2.5-7B, random weights.

    python tests/bench/bench_qlora_7b.py     one JSON line; also $OUT/qlora_7b.json

Needs a CUDA device, bitsandbytes, and what bench_train_20b.py needs. The recipe is made for 16 GB.
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.bench.worker_case import in_child, report_cases, run_worker  # noqa: E402

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
    from tests.bench.bench_train_20b import write_rows

    work = Path(tempfile.mkdtemp(prefix="bench-7b-", dir=os.environ.get("BENCH_DIR")))
    in_child("bench_qlora_7b", work / "base")
    write_rows(work / "packed", ROW_TOKENS, 4 * STEPS, highest=150_000)
    spec = {
        "lora": {"rank": 64, "alpha": 16, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
        "learning_rate": 2e-4,
        "max_steps": STEPS,
        "save_steps": STEPS,
        "gradient_accumulation": 4,
        "quantization": "nf4",
    }
    plan = {"rows_per_device": 1, "gradient_accumulation": 4, "checkpointing": "full"}
    report_cases("qlora_7b", ["recipe"], lambda name: run_worker(work / name, work, spec, plan, ROW_TOKENS))


if __name__ == "__main__":
    main()
