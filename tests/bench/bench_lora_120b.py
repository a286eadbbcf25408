"""gpt-oss-120b's shapes on one GPU: adapters on the last three layers, the others resting on the host in MXFP4.

    python tests/bench/bench_lora_120b.py [CASE ...]     one JSON line a case; also $OUT/lora_120b.json

The last three layers, embedding and head hold random weights, the 33 below zeros, as files with holes
(bench_qlora_110b.py says why): the same bytes to carry and to unpack; every token goes to the same four experts there.
Needs a CUDA device with 80 GB, 10 GB of disk, 70 GB of free host memory, and what bench_train_20b.py needs.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
STEPS, ROW_TOKENS, LAYERS, ADAPTED = 5, 4096, 36, 3
CASES = {"offload-33": 4, "offload-33-1-row": 1}  # name -> rows of a pass


def write_base(folder: Path) -> None:
    """Save one file a layer in the published layout; those of the lower layers end in a hole."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    from tasks.gptoss.mxfp4 import QUANTIZATION_CONFIG, packed_shapes
    from tests.bench.bench_qlora_110b import write_files
    from tests.bench.bench_train_20b import write_tokenizer

    folder.mkdir(parents=True)
    config = GptOssConfig(
        num_hidden_layers=LAYERS,
        num_local_experts=128,
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
        dtype="bfloat16",
        architectures=["GptOssForCausalLM"],
    )
    config.save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": QUANTIZATION_CONFIG}))
    with torch.device("meta"):
        loaded = {name: tuple(weight.shape) for name, weight in GptOssForCausalLM(config).state_dict().items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in loaded.items():
        if len(shape) == 3:
            shapes[f"{name}_blocks"], shapes[f"{name}_scales"] = packed_shapes(shape)
        else:
            shapes[name] = shape
    write_files(folder, shapes, num_holes=LAYERS - ADAPTED)
    write_tokenizer(folder)


def run_case(name: str, work: Path) -> dict[str, Any]:  # Any: JSON values
    """Run the worker on one case; return what it measured."""
    rows, run = CASES[name], work / name
    run.mkdir()
    layers = range(LAYERS - ADAPTED, LAYERS)
    experts = [f"{layer}.mlp.experts.{part}" for layer in layers for part in ("gate_up_proj", "down_proj")]
    spec = {
        "lora": {"rank": 8, "alpha": 16, "target_parameters": experts},
        "learning_rate": 2e-4,
        "max_steps": STEPS,
        "save_steps": STEPS,
        "gradient_accumulation": 4,
        "offload_layers": LAYERS - ADAPTED,
    }
    plan = {
        "rows_per_device": rows,
        "gradient_accumulation": 4 // rows,
        "checkpointing": "none",
        "num_offloaded": LAYERS - ADAPTED,
    }
    job = {"folder": str(run), "spec": spec, "plan": plan, "row_tokens": ROW_TOKENS}
    job |= {"base_folder": str(work / "base"), "packed_folder": str(work / "packed")}
    (run / "job.json").write_text(json.dumps(job))
    start = time.perf_counter()
    argv = [sys.executable, "-m", "tasks.train.worker", str(run / "job.json")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"name": name, "error": (done.stdout[-1500:] + done.stderr)[-3500:]}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "name": name,
        **plan,
        "row_tokens": ROW_TOKENS,
        "num_trainable": json.loads((run / "result.json").read_text())["num_trainable"],
        "tokens_per_s": round(statistics.median(record["tokens_per_s"] for record in records[2:])),
        "peak_gpu_gb": round(max(record["peak_gpu_bytes"] for record in records) / 1e9, 2),
        "losses": [round(record["loss"], 5) for record in records],
        "said": [line for line in done.stdout.splitlines() if "rest in the host" in line],
        "worker_s": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Make the inputs, run the cases, report."""
    if not Path("/dev/nvidia0").exists():
        sys.stdout.write('{"name": "train-lora-120b", "skipped": "no CUDA device"}\n')
        return
    import torch

    from tests.bench.bench_train_20b import write_rows

    work = Path(tempfile.mkdtemp(prefix="bench-120b-", dir=os.environ.get("BENCH_DIR")))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.bench.bench_lora_120b import write_base; "
    code += f"from pathlib import Path; write_base(Path({str(work / 'base')!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    write_rows(work / "packed", ROW_TOKENS, 4 * STEPS)
    names = sys.argv[1:] or list(CASES)
    report: dict[str, Any] = {
        "name": "train-lora-120b",
        "command": " ".join(["python tests/bench/bench_lora_120b.py", *names]),
        "machine": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "cases": [],
    }
    for name in names:
        report["cases"].append(run_case(name, work))
        sys.stdout.write(json.dumps(report["cases"][-1]) + "\n")
        sys.stdout.flush()
        if "OUT" in os.environ:  # after each case: a run that is cut off keeps the others
            (Path(os.environ["OUT"]) / "lora_120b.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
