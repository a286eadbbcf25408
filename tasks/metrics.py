"""metrics.jsonl: one record per logged step, appended by a trainer, read by everybody else.

Ring: edge (disk). Imports no torch.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks import files


def truncate_metrics(path: Path, step: int) -> None:
    """Keep only the records up to `step`: those after it are trained, and written, again."""
    records = [record for record in read_metrics(path) if record["step"] <= step]
    files.write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def append_metrics(path: Path, record: dict[str, Any]) -> None:  # Any: JSON values
    """Append one record in one write."""
    with path.open("a") as handle:
        handle.write(json.dumps(record) + "\n")


def say_record(record: Mapping[str, Any]) -> str:  # Any: JSON values
    """Write a record for a person; what it does not tell is left out.

    >>> say_record({"step": 3, "num_steps": 9, "loss": 1.25, "tokens_per_s": 17310, "mfu_pct": 31.2,
    ...     "peak_gpu_bytes": 49_800_000_000, "seconds_left": 95.0})
    'step 3 of 9, loss 1.2500, 17,310 tokens/s, MFU 31 %, 49.8 GB at most, 2 min left'
    """
    parts = [f"step {record['step']} of {record['num_steps']}"]
    parts += [f"{name} {record[name]:.4f}" for name in ("loss", "reward") if name in record]
    if record.get("tokens_per_s"):
        parts.append(f"{record['tokens_per_s']:,} tokens/s")
    if record.get("mfu_pct"):
        parts.append(f"MFU {record['mfu_pct']:.0f} %")
    if peak := record.get("peak_gpu_bytes") or record.get("peak_host_bytes"):
        parts.append(f"{peak / 1e9:.1f} GB at most")
    if record.get("seconds_left") is not None:
        parts.append(f"{math.ceil(record['seconds_left'] / 60)} min left")
    return ", ".join(parts)


def read_metrics(path: Path) -> list[dict[str, Any]]:  # Any: JSON values
    """Return the records of metrics.jsonl; a torn last line is left out."""
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
