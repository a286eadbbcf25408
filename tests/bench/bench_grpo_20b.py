"""GRPO in gpt-oss-20b's shapes on one GPU: our own worker, random weights, questions of random tokens.

    python tests/bench/bench_grpo_20b.py [CASE ...]      a table last; grpo_20b.json in $BENCH_OUT or $OUT

Runs tasks.reinforce.worker exactly as the flow does (TRL, PEFT, rewards, streams, the check of the rollouts) on random
bf16 weights in the shapes of openai/gpt-oss-20b. Random weights hardly ever end an answer, so each completion has all
its tokens: the dearest case. Needs a CUDA device with 80 GB, torch, transformers, peft, trl, datasets, pydantic and
httpx; no Prefect, no network; the cases with vLLM need vLLM beside them. Cases that start from an adapter, a random
one that says something, show whether an engine runs it. BENCH_DIR: where 42 GB of weights go (default: temporary);
BENCH_LIMIT_S: seconds that a case may take.
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

from tests.bench.bench_train_20b import ATTENTION, EXPERTS  # noqa: E402
from tests.bench.worker_case import in_child  # noqa: E402

STEPS, LIMIT_S = 4, int(os.environ.get("BENCH_LIMIT_S", "900"))
VLLM: dict[str, Any] = {"rollouts": "vllm", "vllm_memory_share": 0.4}  # Any: fields of ReinforceSpec
SEEDS = [f"{layer}.mlp.experts.{name}" for layer in (7, 15, 23) for name in ("gate_up_proj", "down_proj")]


def case(
    prompt_tokens: int, completion_tokens: int, *, parameters: list[str] = SEEDS, start: bool = False, **changes: Any
) -> dict[str, Any]:
    """One run: what is asked, what the recipe changes. The defaults are the seed's."""
    lora = {"rank": 8, "alpha": 16, "target_parameters": parameters, "target_modules": ATTENTION}
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "start": start,
        "changes": {"lora": lora, "rows_per_device": 1, "gradient_accumulation": 8, "num_generations": 4, **changes},
    }


CASES = {
    "seed-256": case(128, 256),
    "seed-256-all-at-once": case(128, 256, rows_per_device=8, gradient_accumulation=1),
    "seed-1024": case(128, 1024),
    "32-rows-256": case(128, 256, rows_per_device=4),
    "all-experts-256": case(128, 256, parameters=EXPERTS),
    "stock-256": case(128, 256, kernels="stock"),
    "seed-256-vllm": case(128, 256, **VLLM),
    "32-rows-256-vllm": case(128, 256, rows_per_device=4, **VLLM),
    "32-rows-256-continuous": case(128, 256, rows_per_device=4, rollouts="continuous"),
    "started": case(128, 256, parameters=EXPERTS, rows_per_device=4, start=True, max_steps=2),
    "started-vllm": case(128, 256, parameters=EXPERTS, rows_per_device=4, start=True, max_steps=2, **VLLM),
    "started-continuous": case(
        128, 256, parameters=EXPERTS, rows_per_device=4, start=True, max_steps=2, rollouts="continuous"
    ),
}


def write_questions(folder: Path, prompt_tokens: int, count: int = 64) -> None:
    """Write packed rows of one question and a short answer each, as tasks/pack does."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = np.random.default_rng(0)
    asked = [draw.integers(2, 64, prompt_tokens).tolist() for _ in range(count)]
    answers = [draw.integers(2, 64, 4).tolist() for _ in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        "input_ids": [one + other for one, other in zip(asked, answers, strict=True)],
        "labels": [[-100] * prompt_tokens + other for other in answers],
        "seq_lengths": [[prompt_tokens + 4]] * count,
    }
    pq.write_table(pa.table(rows), folder / "train.parquet")
    documents = {"row_id": ["0", "1"], "prompt_ids": asked[:2], "answer_ids": answers[:2]}
    pq.write_table(pa.table(documents), folder / "validation_documents.parquet")


def write_start(work: Path, lora: dict[str, Any]) -> str:  # Any: JSON values
    """Write a random adapter whose change is a quarter of the weights'; return its folder."""
    from tests.bench.bench_merge import shape_20b
    from tests.merging import write_adapter

    if not (work / "start").exists():
        targets = {name: lora[name] for name in ("target_modules", "target_parameters")}
        write_adapter(work / "start", shape_20b(), size=0.03, r=lora["rank"], lora_alpha=lora["alpha"], **targets)
    return str(work / "start")


def need_base(work: Path) -> None:
    """Write the base unless it is there; in a child: the parent must leave the GPU to the worker."""
    if not (work / "base" / "config.json").exists():
        in_child("bench_train_20b", work / "base")


def make_job(wanted: dict[str, Any], work: Path, run: Path) -> dict[str, Any]:  # Any: JSON values
    """Return the worker's job for one case, with what it reads written."""
    packed = work / f"questions-{wanted['prompt_tokens']}"
    if not packed.exists():
        write_questions(packed, wanted["prompt_tokens"])
    spec = {
        "rewards": [{"name": "length", "arguments": {"most": 100000}}, {"name": "characters"}],
        "max_sequence_tokens": wanted["prompt_tokens"] + wanted["completion_tokens"] + 8,
        "max_completion_tokens": wanted["completion_tokens"],
        "max_steps": STEPS,
        "save_steps": STEPS,
        "quantization": "none",
        **wanted["changes"],
    }
    return {
        "folder": str(run),
        "spec": spec,
        "base_folder": str(work / "base"),
        "packed_folder": str(packed),
        "start_adapter": write_start(work, spec["lora"]) if wanted["start"] else None,
    }


def run_case(name: str, work: Path) -> dict[str, Any]:  # Any: JSON values
    """Run the worker on one case; return what it measured."""
    wanted, run = CASES[name], work / name
    run.mkdir()
    job = make_job(wanted, work, run)
    (run / "job.json").write_text(json.dumps(job))
    start = time.perf_counter()
    argv = [sys.executable, "-m", "tasks.reinforce.worker", str(run / "job.json")]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # as the product starts it
    with (run / "output.log").open("wb") as log:
        try:
            code = subprocess.run(
                argv, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT_S, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    measured = measure([json.loads(line) for line in lines])
    told = {} if code == 0 else {"exit": code, "error": (run / "output.log").read_text(errors="replace")[-2000:]}
    return {"name": name, **wanted, **measured, **told, "worker_s": round(time.perf_counter() - start, 1)}


def measure(records: list[dict[str, Any]]) -> dict[str, Any]:  # Any: JSON values
    """Return medians over the steps after the first, which compiles."""
    steady = records[1:] or records
    if not steady:
        return {"steps": 0}

    def middle(name: str) -> float | None:
        values = [record[name] for record in steady if record.get(name) is not None]
        return round(statistics.median(values), 3) if values else None

    names = ("rollout_s", "score_s", "learn_s", "rollout_tokens_per_s", "learnt_tokens_per_s", "completion_tokens")
    shown = ("ratio_mean", "ratio_min", "ratio_max", "adapter_share", "adapter_share_error", "adapter_change")
    found = {name: middle(name) for name in (*names, *shown)}
    seconds = [
        record["rollout_s"] + record["score_s"] + record["learn_s"] for record in steady if "rollout_s" in record
    ]
    return {
        "steps": len(records),
        "step_s": round(statistics.median(seconds), 2),
        **found,
        "first_step_s": round(sum(records[0].get(name) or 0 for name in ("rollout_s", "score_s", "learn_s")), 1),
        "peak_gpu_gb": round(max(record.get("peak_gpu_bytes", 0) for record in records) / 1e9, 1),
        "losses": [record["loss"] for record in records],
    }


def table(cases: list[dict[str, Any]]) -> str:  # Any: JSON values
    """Return the short table that is printed last."""
    names = ("step s", "rollout", "score", "learn", "gen tok/s", "learn tok/s", "GB")
    lines = [
        f"{'case':22} " + " ".join(f"{name:>{size}}" for name, size in zip(names, (7, 8, 6, 6, 9, 11, 5), strict=True))
    ]
    for each in cases:
        if not each.get("step_s"):
            lines.append(f"{each['name']:22} failed: {str(each.get('error', ''))[-90:].strip()!r}")
            continue
        lines.append(
            f"{each['name']:22} {each['step_s']:7.2f} {each['rollout_s']:8.2f} {each['score_s']:6.2f} "
            f"{each['learn_s']:6.2f} {each['rollout_tokens_per_s']:9.1f} {each['learnt_tokens_per_s']:11.1f} "
            f"{each['peak_gpu_gb']:5.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Make the base, run the cases, report after each."""
    if not Path("/dev/nvidia0").exists():
        sys.stdout.write('{"name": "grpo-gptoss20b", "skipped": "no CUDA device"}\n')
        return
    import torch

    work = Path(os.environ.get("BENCH_DIR") or tempfile.mkdtemp(prefix="bench-grpo-"))
    work.mkdir(parents=True, exist_ok=True)
    need_base(work)
    names = sys.argv[1:] or list(CASES)
    report: dict[str, Any] = {
        "command": " ".join(["python tests/bench/bench_grpo_20b.py", *names]),
        "machine": subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cases": [],
    }
    out = os.environ.get("BENCH_OUT") or os.environ.get("OUT") or str(work)
    for name in names:
        report["cases"].append(run_case(name, work))
        sys.stdout.write(json.dumps(report["cases"][-1]) + "\n")
        sys.stdout.flush()
        (Path(out) / "grpo_20b.json").write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(table(report["cases"]) + "\n")


if __name__ == "__main__":
    main()
