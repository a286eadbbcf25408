"""Keep metrics.jsonl whole: each step once, also when a log is read again or a job is started again.

Ring: edge (disk).
"""

from pathlib import Path
from typing import Any

from tasks.metrics import append_metrics, read_metrics, truncate_metrics


class StepLog:
    """The records of one run over all its jobs. An `attempt` is one job; later ones repeat steps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        records = read_metrics(path)
        if records:
            truncate_metrics(path, records[-1]["step"])  # drops a torn last line, which a kill left
        self._attempts = {record["step"]: record["attempt"] for record in records}

    def add(self, record: dict[str, Any]) -> bool:  # Any: JSON values
        """Append a record unless its step is there; return whether it was new.

        A step that an earlier attempt had reached is trained anew: it and those behind it are replaced.
        """
        step, attempt = record["step"], record["attempt"]
        is_test_only = "reward" not in record  # verl tests again at the checkpoint that it goes on from
        if self._attempts.get(step, -1) >= attempt or (is_test_only and step in self._attempts):
            return False
        if any(known >= step for known in self._attempts):
            truncate_metrics(self.path, step - 1)
            self._attempts = {known: number for known, number in self._attempts.items() if known < step}
        append_metrics(self.path, record)
        self._attempts[step] = attempt
        return True
