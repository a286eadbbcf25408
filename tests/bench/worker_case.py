"""One run of the real trainer for a bench: a job is written, the worker trains, and what its metrics say comes back."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_worker(
    run: Path, inputs: Path, spec: dict[str, Any], plan: dict[str, Any], row_tokens: int
) -> dict[str, Any]:  # Any: JSON values
    """Train in the new folder `run` on `inputs`/base and `inputs`/packed; return figures, or {"error": ...}.

    tokens_per_s is the median after the second step.
    """
    run.mkdir()
    job = {"folder": str(run), "spec": spec, "plan": plan, "row_tokens": row_tokens}
    job |= {"base_folder": str(inputs / "base"), "packed_folder": str(inputs / "packed")}
    (run / "job.json").write_text(json.dumps(job))
    start = time.perf_counter()
    argv = [sys.executable, "-m", "tasks.train.worker", str(run / "job.json")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stdout[-1500:] + done.stderr)[-3500:]}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        **plan,
        "row_tokens": row_tokens,
        "num_trainable": json.loads((run / "result.json").read_text())["num_trainable"],
        "tokens_per_s": round(statistics.median(record["tokens_per_s"] for record in records[2:])),
        "peak_gpu_gb": round(max(record.get("peak_gpu_bytes", 0) for record in records) / 1e9, 2),
        "losses": [round(record["loss"], 5) for record in records],
        "said": [line for line in done.stdout.splitlines() if "rest in the host" in line],
        "worker_s": round(time.perf_counter() - start, 1),
    }


def in_child(module: str, folder: Path) -> None:
    """Call write_base(folder) of a bench in a process of its own, which leaves the GPU before the worker takes it."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.bench.{module} import write_base; "
    code += f"from pathlib import Path; write_base(Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def report_cases(bench: str, cases: list[str], run_case: Callable[[str], dict[str, Any]]) -> None:
    """Run the cases one by one; print each, and keep all so far in $OUT/`bench`.json, should the next be cut off."""
    import torch

    report: dict[str, Any] = {
        "name": f"train-{bench.replace('_', '-')}",
        "command": " ".join([f"python tests/bench/bench_{bench}.py", *cases]),
        "machine": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "cases": [],
    }
    for name in cases:
        report["cases"].append({"name": name, **run_case(name)})
        sys.stdout.write(json.dumps(report["cases"][-1]) + "\n")
        sys.stdout.flush()
        if "OUT" in os.environ:
            (Path(os.environ["OUT"]) / f"{bench}.json").write_text(json.dumps(report, indent=1) + "\n")
