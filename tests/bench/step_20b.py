"""One training step of the gpt-oss-20b architecture, taken apart: for work on the kernels, no baseline.

    python tests/bench/step_20b.py ROWS CHECKPOINTING [TARGETS] [LAYERS]     e.g. 1 selective-10 attention

Random weights made on the GPU, plain AdamW, no Trainer, $PASSES of ROWS rows a step; prints tokens/s, peak memory and,
with $PROFILE, the dearest GPU kernels.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
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
    layers = checkpointing.partition("-")[2] or num_layers
    factor_experts(model, num_recomputed=int(layers) if checkpointing.startswith("selective") else 0, era=era)
    fuse_norms(model)
    flash_attention(model)
    if "apart" not in os.environ.get("WITHOUT", ""):
        join_layers(model, era=era)
    if "host" not in os.environ.get("WITHOUT", ""):
        rest_embedding(model)
    head.FROZEN_HEAD_ROWS = int(os.environ.get("HEAD_ROWS", head.FROZEN_HEAD_ROWS))
    head.fuse_head(model)
    if checkpointing == "full":
        peft.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    peft.train()
    trained = [p for p in peft.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    positions = torch.arange(ROW_TOKENS, device="cuda").repeat(rows)[None]

    def step() -> float:
        for _ in range(passes):
            era.begin()
            ids = torch.randint(0, 201088, (1, rows * ROW_TOKENS), device="cuda")
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = peft(input_ids=ids, position_ids=positions, labels=ids).loss / passes
            loss.backward()
        era.end()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item() * passes

    seconds = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    median = sorted(seconds[2:])[len(seconds[2:]) // 2]
    report = {
        "rows": rows,
        "passes": passes,
        "row_tokens": ROW_TOKENS,
        "checkpointing": checkpointing,
        "targets": targets,
        "layers": num_layers,
        "first_s": round(seconds[0], 1),
        "step_s": round(median, 4),
        "tokens_per_s": round(passes * rows * ROW_TOKENS / median),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "loss": round(loss, 3),
    }
    sys.stdout.write(json.dumps(report) + "\n")
    if os.environ.get("PROFILE"):
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as result:
            step()
            torch.cuda.synchronize()
        table = result.key_averages().table(sort_by="self_cuda_time_total", row_limit=32, max_name_column_width=70)
        kept = [line[:72] + line[-75:] for line in table.splitlines()]
        sys.stdout.write("\n".join(kept) + "\n")


if __name__ == "__main__":
    main()
