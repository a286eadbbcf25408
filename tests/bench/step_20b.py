"""One training step of the gpt-oss-20b architecture, taken apart: for work on the kernels, no baseline.

    python tests/bench/step_20b.py ROWS CHECKPOINTING,... [TARGETS] [LAYERS]     e.g. 1 selective-8,offload-8 attention

Random weights made on the GPU, plain AdamW, no Trainer, $PASSES of ROWS rows a step; prints for each kind of
checkpointing tokens/s, peak memory and how long Python took to launch it all (`launch_s`); with $PROFILE how long the
GPU was busy, and its dearest kernels.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tasks.gptoss.attention import find_documents
from tasks.gptoss.experts import Place
from tasks.gptoss.forward import find_decoder
from tasks.gptoss.head import learnt_places
from tasks.gptoss.shelf import Shelf, shelved_layers

ROW_TOKENS = int(os.environ.get("ROW_TOKENS", "4096"))


def main() -> None:
    """Time steps, then profile one."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tasks.gptoss.embedding import rest_embedding
    from tasks.gptoss.forward import factor_experts, flash_attention, fuse_norms, join_layers
    from tasks.gptoss.product import Era
    from tasks.train import loss as head
    from tests.bench.bench_train_20b import ATTENTION, EXPERTS, SEEDS, build

    rows, checkpointing = int(sys.argv[1]), sys.argv[2]
    targets = sys.argv[3] if len(sys.argv) > 3 else "all"
    num_layers = int(sys.argv[4]) if len(sys.argv) > 4 else 24
    model = build(num_layers)
    model.config.use_cache = False
    names = SEEDS if targets == "seed" else EXPERTS
    attention = ATTENTION if targets == "attention" else []
    config = LoraConfig(r=8, lora_alpha=16, target_modules=attention, target_parameters=names)
    peft = get_peft_model(model, config)
    era, passes = Era(), int(os.environ.get("PASSES", "1"))
    kinds = checkpointing.split(",")
    factor_experts(model, num_shelved=1, era=era)
    fuse_norms(model)
    flash_attention(model)
    if "apart" not in os.environ.get("WITHOUT", ""):
        join_layers(model, era=era)
    if "host" not in os.environ.get("WITHOUT", ""):
        rest_embedding(model)
    head.FROZEN_HEAD_ROWS = int(os.environ.get("HEAD_ROWS", head.FROZEN_HEAD_ROWS))
    head.fuse_head(model)
    peft.train()
    trained = [p for p in peft.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    positions = torch.arange(ROW_TOKENS, device="cuda").repeat(rows)[None]
    told: dict[str, Any] = {}
    if "told" not in os.environ.get("WITHOUT", ""):
        told = {"documents": find_documents(positions), "learnt_M": learnt_places(positions)}

    def step() -> tuple[float, float]:
        start = time.perf_counter()
        for _ in range(passes):
            era.begin()
            ids = torch.randint(0, 201088, (1, rows * ROW_TOKENS), device="cuda")
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = peft(input_ids=ids, position_ids=positions, labels=ids, **told).loss / passes
            loss.backward()
        era.end()
        optimizer.step()
        optimizer.zero_grad()
        launched = time.perf_counter() - start
        return loss.item() * passes, launched

    for kind in kinds:
        recompute(model, kind)
        torch.cuda.reset_peak_memory_stats()
        seconds, launching = [], []
        for _ in range(7):
            torch.cuda.synchronize()
            start = time.perf_counter()
            loss, launched = step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            launching.append(launched)
        median = sorted(seconds[2:])[len(seconds[2:]) // 2]
        report = {
            "rows": rows,
            "passes": passes,
            "row_tokens": ROW_TOKENS,
            "checkpointing": kind,
            "targets": targets,
            "layers": num_layers,
            "first_s": round(seconds[0], 1),
            "step_s": round(median, 4),
            "launch_s": round(sorted(launching[2:])[len(launching[2:]) // 2], 4),
            "tokens_per_s": round(passes * rows * ROW_TOKENS / median),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "loss": round(loss, 3),
        }
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()
    if os.environ.get("PROFILE"):
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as result:
            step()
            torch.cuda.synchronize()
        sys.stdout.write(say_busy(result.events()) + "\n")
        table = result.key_averages().table(sort_by="self_cuda_time_total", row_limit=70, max_name_column_width=90)
        kept = [line[:92] + line[-75:] for line in table.splitlines()]
        sys.stdout.write("\n".join(kept) + "\n")


def recompute(model: Any, kind: str) -> None:  # Any: a transformers gpt-oss
    """Set what each layer does with its gate's argument: none, selective-N, offload-N."""
    name, _, count = kind.partition("-")
    layers = find_decoder(model).layers
    shelved = shelved_layers(len(layers), 0, int(count) if name == "offload" else 0)
    shelf = Shelf()
    for number, layer in enumerate(layers):
        experts = layer.mlp.experts
        experts.recompute_gate = name == "selective" and number < int(count)
        experts.place = Place(shelf=shelf, layer=number, is_shelved=number in shelved) if shelved else None


def say_busy(events: Any) -> str:  # Any: torch's list of what the profiler saw
    """Return for how long at least one kernel ran, of the time from the first to the last."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if "CUDA" in str(e.device_type))
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return f"busy {busy / 1e3:.1f} ms of {(end - spans[0][0]) / 1e3:.1f} ms, {len(spans)} kernels and copies"


if __name__ == "__main__":
    main()
