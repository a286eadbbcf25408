"""What there is to show of a pretraining while it runs, and when it has ended: read from what its trainer appends.

    metrics.jsonl, evaluations.jsonl, experts.jsonl
        -> {"pretrain-live": Markdown, "pretrain-loss", "-memory", "-experts": PNG}

Ring: edge (disk, nvidia-smi).
"""

from pathlib import Path

from tasks.machine import list_gpus
from tasks.metrics import read_metrics
from tasks.pictures import expert_usage, memory_curve, training_panels
from tasks.pretrain.plan import EXPERTS
from tasks.pretrain.report import live_markdown


def look(folder: Path, estimate_bytes: int = 0) -> dict[str, str | bytes]:
    """Return key -> text or PNG of a pretraining's folder; only what is there already.

    Args:
        folder: with metrics.jsonl and, where the trainer counts them, experts.jsonl.
        estimate_bytes: memory that was reckoned before the run; 0: not known.
    """
    records, usage = read_metrics(folder / "metrics.jsonl"), read_metrics(folder / EXPERTS)
    held_out = read_metrics(folder / "evaluations.jsonl")
    title = f"Pretraining {folder.name[:8]}"
    shown: dict[str, str | bytes] = {"pretrain-live": live_markdown(records, usage, held_out)}
    if records:
        shown["pretrain-loss"] = training_panels(records, title, held_out)
    if any(record.get("peak_gpu_bytes") or record.get("peak_host_bytes") for record in records):
        on_gpu = any(record.get("peak_gpu_bytes") for record in records)
        total = max((gpu.total_bytes for gpu in list_gpus()), default=0) if on_gpu else 0
        shown["pretrain-memory"] = memory_curve(records, title, total_bytes=total, estimate_bytes=estimate_bytes)
    if usage:
        shown["pretrain-experts"] = expert_usage(usage, title)
    return shown
