"""A dense model of the 100 B class by QLoRA on one GPU, its lower layers resting on the host: our own worker.

    python tests/bench/bench_qlora_110b.py [CASE ...]     one JSON line a case; also $OUT/qlora_110b.json

The shapes of Qwen1.5-110B, adapters on the last eight of 80 layers, as the recipes qwen110b_qlora_* have them. Those
eight layers, embedding and head hold random weights; the 72 below hold zeros, as files with holes, since 222 GB fit no
disk here: a zero costs the same memory, the same time on the bus and nearly the same arithmetic. Needs a CUDA device
with 80 GB, 30 GB of disk, 70 GB of free host memory, bitsandbytes, and what bench_train_20b.py needs.
"""

import json
import os
import struct
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.bench.worker_case import in_child, report_cases, run_worker  # noqa: E402

STEPS, ROW_TOKENS, LAYERS, ADAPTED = 6, 1024, 80, 8
SHAPE = {
    "num_hidden_layers": LAYERS,
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 49152,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "eos_token_id": 0,
}
CASES = {  # name -> rows of a pass, layers that rest on the host
    "offload-72": (4, 72),
    "offload-72-1-row": (1, 72),
    "offload-36": (4, 36),
    "offload-0": (4, 0),
}


def write_base(folder: Path) -> None:
    """Save one file a layer; those of the lower layers end in a hole."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.bench.bench_train_20b import write_tokenizer

    folder.mkdir(parents=True)
    config = Qwen2Config(**SHAPE, dtype="bfloat16", architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in Qwen2ForCausalLM(config).state_dict().items()}
    write_files(folder, shapes, num_holes=LAYERS - ADAPTED)
    write_tokenizer(folder)


def write_files(folder: Path, shapes: dict[str, tuple[int, ...]], num_holes: int) -> None:
    """Save one file a layer: random bfloat16 and, under names of MXFP4, bytes; the lowest `num_holes` end in a hole."""
    import torch

    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        parts.setdefault(name.partition(".layers.")[2].partition(".")[0] or "around", {})[name] = shape
    places: dict[str, str] = {}
    torch.manual_seed(0)
    for part, tensors in parts.items():
        path = folder / f"model-{part}.safetensors"
        _write_part(path, tensors, is_hole=part != "around" and int(part) < num_holes)
        places |= dict.fromkeys(tensors, path.name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_part(path: Path, tensors: dict[str, tuple[int, ...]], *, is_hole: bool) -> None:
    import torch

    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        is_packed = name.endswith(("_blocks", "_scales"))
        begin, end = end, end + (1 if is_packed else 2) * prod(shape)
        header[name] = {"dtype": "U8" if is_packed else "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if is_hole:
            file.truncate(file.tell() + end)
            return
        for name, shape in tensors.items():
            if name.endswith("_blocks"):
                drawn = torch.randint(256, shape, dtype=torch.uint8, device="cuda")
            elif name.endswith("_scales"):
                drawn = torch.full(shape, 120, dtype=torch.uint8)  # values of up to 6 * 2 ** -7
            elif name.endswith("norm.weight"):
                drawn = torch.ones(shape, dtype=torch.bfloat16)
            else:
                drawn = (torch.randn(shape, device="cuda") * 0.02).to(torch.bfloat16)
            file.write(drawn.cpu().view(torch.uint8).numpy().tobytes())


def run_case(name: str, work: Path) -> dict[str, Any]:  # Any: JSON values
    """Run the worker on one case; return what it measured."""
    rows, num_offloaded = CASES[name]
    modules = [
        f"{layer}.self_attn.{part}" for layer in range(LAYERS - ADAPTED, LAYERS) for part in ("q_proj", "v_proj")
    ]
    spec = {
        "lora": {"rank": 64, "alpha": 16, "dropout": 0.05, "target_modules": modules},
        "learning_rate": 2e-4,
        "max_steps": STEPS,
        "save_steps": STEPS,
        "gradient_accumulation": 4,
        "quantization": "nf4",
    }
    plan = {"rows_per_device": rows, "gradient_accumulation": 4 // rows, "checkpointing": "full"}
    return run_worker(work / name, work, spec, plan | {"num_offloaded": num_offloaded}, ROW_TOKENS)


def main() -> None:
    """Make the inputs, run the cases, report."""
    if not Path("/dev/nvidia0").exists():
        sys.stdout.write('{"name": "train-qlora-110b", "skipped": "no CUDA device"}\n')
        return
    from tests.bench.bench_train_20b import write_rows

    work = Path(tempfile.mkdtemp(prefix="bench-110b-", dir=os.environ.get("BENCH_DIR")))
    in_child("bench_qlora_110b", work / "base")
    write_rows(work / "packed", ROW_TOKENS, 4 * STEPS, highest=150_000)
    report_cases("qlora_110b", sys.argv[1:] or list(CASES), lambda name: run_case(name, work))


if __name__ == "__main__":
    main()
