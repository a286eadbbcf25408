"""metrics.jsonl: one record per logged step, appended by a trainer, read by everybody else.

Ring: edge (disk). Imports no torch.
"""

import json
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
