"""Deliver traces to a W&B offline run: no account, no network.

    records -> one run per batch: a table and scalar metrics -> run.finish() -> delivered.json

`run.log` is no acknowledgement: a SIGKILL before `finish` loses rows. So a batch counts only once its
run is finished and `delivered.json` lies in the run's folder. A run without it belonged to a drain
that died; it is renamed, so that `wandb sync` never uploads it beside the run that repeats it.

Ring: edge (disk, a wandb process).
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks import files
from tasks.traces.queue import QueuedTrace
from tasks.traces.record import TraceRecord
from tasks.traces.weave_sink import Delivery

DELIVERED = "delivered.json"
_PREFIX = "traces-"
_DATA_DIR = "WANDB_DATA_DIR"
_COLUMNS = (
    *("trace_id", "started_at", "endpoint", "route", "reason", "model", "status", "http_status", "streamed"),
    *("duration_ms", "first_token_ms", "prompt_tokens", "completion_tokens", "request", "response", "error"),
    *("key_name", "upstream", "model_digest", "adapter_digest", "run_id", "sampled", "sample_rate", "redactions"),
)
logger = logging.getLogger(__name__)


class WandbOfflineSink:
    """Writes offline runs below `folder`; call with the queue's lock held."""

    name = "wandb-offline"
    batch_records = 5000

    def __init__(self, folder: Path, project: str) -> None:
        self._folder = folder.absolute()
        self._project = project

    def deliver(self, items: Sequence[QueuedTrace]) -> Delivery:
        """Write the batch as one finished run."""
        self._set_abandoned_aside()
        there = self.delivered_ids() if any(item.redelivered for item in items) else set()
        records = [item.record for item in items if item.record and item.record.trace_id not in there]
        if records:
            self._write_run(records)
        return Delivery(num_delivered=len(records), num_already_there=len(items) - len(records))

    def _write_run(self, records: list[TraceRecord]) -> None:
        import wandb  # 1 s to import: only a drain that has something to write pays it

        self._folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
        name = f"{_PREFIX}{records[0].trace_id}"
        run_of_batch = wandb.init(
            mode="offline",
            project=self._project,
            dir=str(self._folder),
            id=name,
            job_type="ingest-traces",
            settings=settings,
        )
        with _data_folder(Path(run_of_batch.dir).parent), run_of_batch as run:
            table = wandb.Table(columns=list(_COLUMNS))
            for step, record in enumerate(records):
                row = _row(record)
                table.add_data(*row.values())
                run.log(_metrics(row), step=step)
            run.log({"traces": table})
            folder = Path(run.dir).parent
        files.write_json(folder / DELIVERED, [record.trace_id for record in records])
        logger.info("wrote %d traces to offline run %s", len(records), folder)

    def _runs(self) -> list[Path]:
        return sorted((self._folder / "wandb").glob(f"offline-run-*-{_PREFIX}*"))

    def delivered_ids(self) -> set[str]:
        """Return the ids of all traces that lie in a finished run."""
        runs = (run / DELIVERED for run in self._runs())
        return {trace_id for marker in runs if marker.exists() for trace_id in files.read_json(marker)}

    def _set_abandoned_aside(self) -> None:
        for run in self._runs():
            if not (run / DELIVERED).exists():
                run.rename(run.with_name(f"abandoned-{run.name}"))
                logger.warning("set %s aside: its drain died before it was finished", run)


@contextmanager
def _data_folder(folder: Path) -> Iterator[None]:
    """Have W&B stage what `wandb sync` will upload in the run's own folder.

    Its default is ~/.local/share/wandb, where copies of the traces would outlive their run.
    """
    before = os.environ.get(_DATA_DIR)
    os.environ[_DATA_DIR] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(_DATA_DIR)
        os.environ.update({_DATA_DIR: before} if before else {})


def _row(record: TraceRecord) -> dict[str, Any]:  # Any: cells of a table
    usage = record.usage or {}
    measured = {
        "duration_ms": record.duration_ms,
        "first_token_ms": record.first_token_ms,
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "request": json.dumps(record.request, ensure_ascii=False),
        "response": json.dumps(record.response, ensure_ascii=False),
        "redactions": json.dumps(record.redactions),
    }
    return {name: measured[name] if name in measured else getattr(record, name) for name in _COLUMNS}


def _metrics(row: dict[str, Any]) -> dict[str, float]:  # Any: cells of a table
    names = ("duration_ms", "first_token_ms", "prompt_tokens", "completion_tokens", "http_status")
    return {name: row[name] for name in names if isinstance(row[name], (int, float))}
