"""The gpt-oss-20b recipe on one GPU: our own worker, true shapes, random weights.

    python tests/bench/bench_train_20b.py [CASE ...]     one JSON line a case; also $OUT/train_20b.json

Runs tasks.train.worker exactly as the flow does (TRL, PEFT, checkpoints, evaluation) on a folder of
random bf16 weights in the shapes of openai/gpt-oss-20b, with packed rows of random tokens, one document a
row: the most that attention can cost. Needs a CUDA device with 80 GB, torch, transformers, peft, trl and
datasets; no Prefect, no network. `stock` cases are TRL and PEFT as they are, with their best settings.
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
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
STEPS = 8
SEEDS = [f"{layer}.mlp.experts.down_proj" for layer in (7, 15, 23)]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LAST = [f"{layer}.{name}" for layer in (22, 23) for name in EXPERTS]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def case(
    rows: int,
    checkpointing: str,
    *,
    parameters: list[str] = EXPERTS,
    modules: list[str] | None = None,
    row_tokens: int = 4096,
    rows_per_step: int = 4,
    num_recomputed: int = 0,
    num_offloaded: int = 0,
    num_shelved: int = 0,
    **changes: str | int,
) -> dict[str, Any]:  # Any: JSON values
    """One run: what the recipe changes, and the plan of its step."""
    lora = {"rank": 8, "alpha": 16, "target_parameters": parameters, "target_modules": modules or []}
    if num_offloaded:
        changes["offload_layers"] = num_offloaded
    return {
        "changes": {"lora": lora, **changes},
        "row_tokens": row_tokens,
        "plan": {
            "rows_per_device": rows,
            "gradient_accumulation": rows_per_step // rows // int(changes.get("num_processes", 1)),
            "checkpointing": checkpointing,
            "num_recomputed": num_recomputed,
            "num_offloaded": num_offloaded,
            "num_shelved": num_shelved,
        },
    }


SEVERAL_GPUS = ("all-experts-2-gpus", "all-experts-2-gpus-fsdp2", "all-experts-4-gpus")  # run when they are named
CASES = {
    "all-experts": case(4, "none"),
    "all-experts-full": case(4, "full"),
    "all-experts-1-row": case(1, "none"),
    "all-experts-1-row-selective-12": case(1, "selective", num_recomputed=12),
    "all-experts-1-row-selective": case(1, "selective", num_recomputed=24),
    "all-experts-and-attention": case(4, "none", modules=ATTENTION),
    "all-experts-and-attention-full": case(4, "full", modules=ATTENTION),
    "all-experts-and-attention-1-row-selective-8": case(1, "selective", modules=ATTENTION, num_recomputed=8),
    "all-experts-and-attention-1-row-offload-8": case(1, "offload", modules=ATTENTION, num_shelved=8),
    "seeds": case(4, "none", parameters=SEEDS),
    "all-experts-60k": case(1, "full", row_tokens=60_000, rows_per_step=1),
    "all-experts-8-rows": case(4, "none", rows_per_step=8),
    "all-experts-2-gpus": case(4, "none", rows_per_step=8, num_processes=2),
    "all-experts-2-gpus-fsdp2": case(4, "none", rows_per_step=8, num_processes=2, parallel="fsdp2"),
    "all-experts-4-gpus": case(4, "none", rows_per_step=16, num_processes=4),
    "last-layers": case(4, "none", parameters=LAST),
    "last-layers-offload": case(4, "none", parameters=LAST, num_offloaded=22),
    "last-layers-offload-1-row": case(1, "none", parameters=LAST, num_offloaded=22),
    "seeds-stock": case(1, "full", parameters=SEEDS, kernels="stock"),
    "all-experts-stock": case(4, "full", kernels="stock"),
    "all-experts-and-attention-stock": case(4, "full", modules=ATTENTION, kernels="stock"),
}


def gptoss_config(num_layers: int = 24, **changes: Any) -> Any:  # Any: transformers is imported where it is used
    """Return gpt-oss-20b's shapes, or with more layers and experts those of gpt-oss-120b."""
    from transformers import GptOssConfig

    shape = {
        "num_hidden_layers": num_layers,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "sliding_window": 128,
        "pad_token_id": 1,
        "eos_token_id": 0,
    }
    return GptOssConfig(**{**shape, **changes})


def build(num_layers: int = 24) -> Any:  # Any: torch is imported where a GPU is
    """Return a gpt-oss of random bf16 weights in the true shapes, on the GPU."""
    import torch
    from transformers import GptOssForCausalLM

    config = gptoss_config(num_layers)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = GptOssForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def write_base(folder: Path) -> None:
    """Save random weights, and a tokenizer."""
    build().save_pretrained(folder, max_shard_size="5GB")
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Save a tokenizer of a few words: the rows are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, "<pad>": 1, **{str(index): index for index in range(2, 64)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)


def write_rows(folder: Path, row_tokens: int, num_rows: int, highest: int = 200_000) -> None:
    """Write packed rows of one random document each."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = np.random.default_rng(0)
    for name, count in (("train", num_rows), ("validation", 2)):
        ids = [draw.integers(1000, highest, row_tokens).tolist() for _ in range(count)]
        lengths = [[row_tokens]] * count
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"input_ids": ids, "labels": ids, "seq_lengths": lengths}), folder / f"{name}.parquet")


def run_case(name: str, work: Path) -> dict[str, Any]:  # Any: JSON values
    """Run the worker on one case; return what it measured."""
    import torch

    wanted = CASES[name]
    plan, row_tokens = wanted["plan"], wanted["row_tokens"]
    num_processes = wanted["changes"].get("num_processes", 1)
    rows_per_device = plan["rows_per_device"] * plan["gradient_accumulation"]
    rows_per_step = rows_per_device * num_processes
    packed, run = work / f"packed-{row_tokens}-{rows_per_step}", work / name
    if not packed.exists():
        write_rows(packed, row_tokens, rows_per_step * STEPS)
    run.mkdir()
    spec = {"learning_rate": 2e-4, "max_steps": STEPS, "save_steps": STEPS, "gradient_accumulation": rows_per_device}
    job = {
        "folder": str(run),
        "spec": {**spec, **wanted["changes"]},
        "plan": plan,
        "base_folder": str(work / "base"),
        "packed_folder": str(packed),
        "row_tokens": row_tokens,
    }
    (run / "job.json").write_text(json.dumps(job))
    start = time.perf_counter()
    argv = [sys.executable, "-m", "tasks.train.worker", str(run / "job.json")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(num_processes)))}
    if num_processes > 1:
        argv[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"name": name, "error": (done.stdout[-500:] + done.stderr)[-2500:]}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [record["tokens_per_s"] for record in records[3:]]
    result = json.loads((run / "result.json").read_text())
    return {
        "name": name,
        "machine": torch.cuda.get_device_name(0),
        **wanted,
        **plan,
        "num_trainable": result["num_trainable"],
        "tokens_per_s": round(statistics.median(speeds)),
        "spread_pct": round(100 * (max(speeds) - min(speeds)) / statistics.median(speeds), 1),
        "peak_gpu_gb": round(max(record["peak_gpu_bytes"] for record in records) / 1e9, 1),
        "speeds": [round(record["tokens_per_s"]) for record in records],
        "losses": [round(record["loss"], 5) for record in records],
        "worker_s": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Make the base, run the cases, report."""
    if not Path("/dev/nvidia0").exists():
        sys.stdout.write('{"name": "train-gptoss20b", "skipped": "no CUDA device"}\n')
        return
    work = Path(os.environ.get("BENCH_DIR") or tempfile.mkdtemp(prefix="bench-20b-"))
    if not (work / "base").exists():
        # The parent must leave the GPU before the worker takes it: the base is made in a child.
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.bench.bench_train_20b import write_base; "
        code += f"from pathlib import Path; write_base(Path({str(work / 'base')!r}))"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    names = sys.argv[1:] or [name for name in CASES if name not in SEVERAL_GPUS]
    cases = []
    for name in names:
        cases.append(run_case(name, work))
        sys.stdout.write(json.dumps(cases[-1]) + "\n")
        sys.stdout.flush()
    import torch

    report = {
        "command": " ".join(["python tests/bench/bench_train_20b.py", *names]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cases": cases,
    }
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "train_20b.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
