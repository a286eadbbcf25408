"""Our merge beside `cp` of the same bytes and PEFT's merge_and_unload + save_pretrained, in one run.

    python tests/bench/bench_merge.py [--gb 1.3] [--write-baseline]     one JSON line

A gpt-oss with random bf16 weights and a LoRA on attention and all experts. Each way runs in a process of its own, in
turns; times are from after the imports to the last fsync, on files that the page cache holds. Then the results are
compared element by element: in float32, and in bf16, where PEFT rounds an expert's delta once more than we do.
Beyond 5 GB only in bf16. BENCH_DIR is the disk that is measured (default: the temporary folder); it needs room for
five times --gb, up to 5 GB eight times.
"""

import argparse
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
REPEATS, MOST_GB_IN_FLOAT32 = 3, 5
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def shape_of(gb: float) -> Any:  # Any: GptOssShape; imported late, with torch
    """A gpt-oss of about so many gigabytes in bf16, in 20b's proportions: of at most 24 layers, as the 20b has."""
    from tasks.specs import GptOssShape

    layer_gb, head_gb = 0.108, 0.13
    layers = min(24, max(1, round((gb - head_gb) / layer_gb)))
    return GptOssShape(
        num_layers=layers,
        hidden_size=1024,
        intermediate_size=1024,
        num_experts=max(16, round(16 * (gb - head_gb) / (layer_gb * layers))),
        experts_per_token=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=32768,
        sliding_window=128,
        context_tokens=4096,
        initial_context_tokens=2048,
    )


def shape_20b() -> Any:  # Any: as above
    """The shapes of openai/gpt-oss-20b."""
    from tasks.specs import GptOssShape

    sizes = {"hidden_size": 2880, "intermediate_size": 2880, "num_layers": 24, "num_experts": 32}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201_088}
    return GptOssShape.model_validate({**sizes, **heads, "experts_per_token": 4, "sliding_window": 128})


def fsync_all(folder: Path) -> None:
    """Wait until a folder's files are on the disk."""
    for path in folder.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())


def copy(base: Path, adapter: Path, target: Path, dtype: str) -> None:
    """`cp` of the weights, and fsync as we do it."""
    target.mkdir()
    subprocess.run(["cp", "--reflink=never", *map(str, sorted(base.glob("*.safetensors"))), str(target)], check=True)
    fsync_all(target)


def stream(base: Path, adapter: Path, target: Path, dtype: str) -> None:
    """The merge without PEFT's check, which costs the same few seconds for a model of any size."""
    import torch

    from tests.merging import stream as write

    torch.set_num_threads(1)
    write(base, adapter, target, dtype=dtype)


def ours(base: Path, adapter: Path, target: Path, dtype: str) -> None:
    """The merge as the task does it, PEFT's check and digests included."""
    from tasks.merge.run import merge_folders
    from tasks.specs import MergeSpec

    merge_folders(base, adapter, target / "model", MergeSpec.model_validate({"dtype": dtype}))


def peft(base: Path, adapter: Path, target: Path, dtype: str) -> None:
    """What the seeds do."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(target, max_shard_size="10GB")
    fsync_all(target)


WAYS = {"cp": copy, "stream": stream, "ours": ours, "peft": peft}


def run_way(way: str, work: Path, dtype: str) -> dict[str, float]:
    """Run one way in a process of its own; return its seconds, CPU seconds and peak memory."""
    subprocess.run(["rm", "-rf", str(work / way)], check=True)
    code = f"from tests.bench.bench_merge import child; child({way!r}, {str(work)!r}, {dtype!r})"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    output = subprocess.run([sys.executable, "-c", code], env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    if way in ("cp", "stream"):  # nothing is compared with them
        subprocess.run(["rm", "-rf", str(work / way)], check=True)
    return json.loads(output.strip().splitlines()[-1])


def child(way: str, work: str, dtype: str) -> None:
    """What runs in the process: everything is imported before the clock starts."""
    import torch  # noqa: F401

    if way == "peft":
        import peft
        import transformers  # noqa: F401

        assert peft.PeftModel
    if way == "ours":
        import tasks.merge.run  # noqa: F401
    if way == "stream":
        import tests.merging  # noqa: F401
    folder = Path(work)
    start, times = time.perf_counter(), os.times()
    WAYS[way](folder / "base", folder / "adapter", folder / way, dtype)
    seconds, end = time.perf_counter() - start, os.times()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    cpu = sum(end[:4]) - sum(times[:4])
    sys.stdout.write(
        "\n" + json.dumps({"s": seconds, "cpu_s": cpu, "peak_mb": int(status["VmHWM"].split()[0]) / 1024}) + "\n"
    )


def compare(work: Path, dtype: str) -> dict[str, int]:
    """Count the elements in which ours differs from PEFT's, and from PEFT's with its second rounding."""
    import torch

    from tasks import files
    from tasks.merge.plan import plan_merge
    from tasks.merge.reader import Reader
    from tasks.merge.stream import read_factors

    readers = [Reader(work / part) for part in ("base", "adapter", "ours/model", "peft")]
    base, adapter, mine, theirs = readers
    config = files.read_json(work / "adapter/adapter_config.json")
    stored = {"bfloat16": "BF16", "float32": "F32"}[dtype]
    plan = plan_merge(base.headers, adapter.headers, config, dtype=stored, experts="plain", shard_bytes=10**10)
    counts = {"elements": 0, "differing": 0, "unexplained": 0}
    for output in plan.outputs:
        a, b = mine.tensor(output.name), theirs.tensor(output.name)
        counts["elements"] += a.numel()
        counts["differing"] += int((a != b).sum())
        if output.change and output.num_experts:
            pairs = read_factors(output, output.change, adapter)
            delta = torch.stack([left @ right * output.change.scale for left, right in pairs]).to(b.dtype)
            twice = base.tensor(output.name).to(b.dtype) + delta  # PEFT rounds the delta, then the sum
            counts["unexplained"] += int((twice != b).sum())
        else:
            counts["unexplained"] += int((a != b).sum())
    return counts


def measure(gb: float, work: Path) -> dict[str, Any]:  # Any: JSON values
    """Make the model, run every way in turns, compare."""
    from tests.merging import write_adapter, write_base

    shape = shape_of(gb)
    write_base(work / "base", shape)
    write_adapter(work / "adapter", shape, target_modules=ATTENTION, target_parameters=EXPERTS)
    num_bytes = sum(path.stat().st_size for path in (work / "base").glob("*.safetensors"))
    rounds = [{way: run_way(way, work, "bfloat16") for way in WAYS} for _ in range(REPEATS)]
    line: dict[str, Any] = {
        "name": "merge",
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "gb": num_bytes / 1e9,
    }
    for way in WAYS:
        for what in ("s", "cpu_s", "peak_mb"):
            line[f"{way}_{what}"] = round(statistics.median(found[way][what] for found in rounds), 2)
    for way in ("stream", "ours", "peft"):
        line[f"{way}_share_of_cp_pct"] = round(100 * statistics.median(r["cp"]["s"] / r[way]["s"] for r in rounds))
    line["rounds_s"] = [{way: round(found[way]["s"], 2) for way in WAYS} for found in rounds]
    line["bfloat16"] = compare(work, "bfloat16")
    if gb <= MOST_GB_IN_FLOAT32:
        for way in ("ours", "peft"):
            run_way(way, work, "float32")
        line["float32"] = compare(work, "float32")
    return line


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.3)
    parser.add_argument("--write-baseline", action="store_true", help="make this run the committed baseline")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR"), prefix="bench-merge-") as folder:
        found = measure(options.gb, Path(folder))
    if options.write_baseline:
        name = f"merge_{platform.machine()}_{os.cpu_count()}cpu.json"
        (ROOT / "tests/bench/baselines" / name).write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(json.dumps(found) + "\n")
