"""gpt-oss-120b's shapes on one GPU: adapters on the last three layers, the others resting on the host in MXFP4.

    python tests/bench/bench_lora_120b.py [CASE ...]     one JSON line a case; also $OUT/lora_120b.json

The last three layers, embedding and head hold random weights, the 33 below zeros, as files with holes
(bench_qlora_110b.py says why): the same bytes to carry and to unpack; every token goes to the same four experts there.
Needs a CUDA device with 80 GB, 10 GB of disk, 70 GB of free host memory, and what bench_train_20b.py needs.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.bench.worker_case import in_child, report_cases, run_worker  # noqa: E402

STEPS, ROW_TOKENS, LAYERS, ADAPTED = 5, 4096, 36, 3
CASES = {"offload-33": 4, "offload-33-1-row": 1}  # name -> rows of a pass


def write_base(folder: Path) -> None:
    """Save one file a layer in the published layout; those of the lower layers end in a hole."""
    import torch
    from transformers import GptOssForCausalLM

    from tasks.gptoss.mxfp4 import QUANTIZATION_CONFIG, packed_shapes
    from tests.bench.bench_qlora_110b import write_files
    from tests.bench.bench_train_20b import gptoss_config, write_tokenizer

    folder.mkdir(parents=True)
    config = gptoss_config(LAYERS, num_local_experts=128, dtype="bfloat16", architectures=["GptOssForCausalLM"])
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
    rows = CASES[name]
    layers = range(LAYERS - ADAPTED, LAYERS)
    experts = [f"{layer}.mlp.experts.{part}" for layer in layers for part in ("gate_up_proj", "down_proj")]
    spec = {
        "lora": {"rank": 8, "alpha": 16, "target_parameters": experts},
        "learning_rate": 2e-4,
        "max_steps": STEPS,
        "save_steps": STEPS,
        "gradient_accumulation": 4,
    }
    plan = {"rows_per_device": rows, "gradient_accumulation": 4 // rows, "checkpointing": "none"}
    return run_worker(work / name, work, spec, plan | {"num_offloaded": LAYERS - ADAPTED}, ROW_TOKENS)


def main() -> None:
    """Make the inputs, run the cases, report."""
    if not Path("/dev/nvidia0").exists():
        sys.stdout.write('{"name": "train-lora-120b", "skipped": "no CUDA device"}\n')
        return
    from tests.bench.bench_train_20b import write_rows

    work = Path(tempfile.mkdtemp(prefix="bench-120b-", dir=os.environ.get("BENCH_DIR")))
    in_child("bench_lora_120b", work / "base")
    write_rows(work / "packed", ROW_TOKENS, 4 * STEPS)
    report_cases("lora_120b", sys.argv[1:] or list(CASES), lambda name: run_case(name, work))


if __name__ == "__main__":
    main()
