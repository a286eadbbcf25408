import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.traces.queue import FileQueue
from tasks.traces.run import drain_traces
from tasks.traces.spec import DrainSpec
from tasks.traces.wandb_sink import DELIVERED, WandbOfflineSink

pytestmark = pytest.mark.long

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    yield
    wandb.teardown()


def read_back(run):
    """Return (history rows, the logged table) of an offline run, by W&B's own reader."""
    argv = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    lines = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    history = [record["history"]["item"] for record in map(json.loads, lines) if record["type"] == "history"]
    table = next(run.glob("files/media/table/*.table.json"))
    return history, json.loads(table.read_text())


def test_a_drain_without_an_account_leaves_one_finished_run_that_reads_back(tmp_path, make_record, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "elsewhere"))
    queue = FileQueue(tmp_path / "q.jsonl")
    queue.append(make_record(n).to_line() for n in range(4))
    sink = WandbOfflineSink(tmp_path / "runs", "tatara")
    report = drain_traces(queue, sink, DrainSpec())
    assert (report.sink, report.num_delivered, report.num_waiting) == ("wandb-offline", 4, 0)
    (run,) = (tmp_path / "runs" / "wandb").glob("offline-run-*")
    history, table = read_back(run)
    assert [row["completion_tokens"] for row in history if "completion_tokens" in row] == [0, 1, 2, 3]
    assert {row["duration_ms"] for row in history if "duration_ms" in row} == {2.5}
    assert [row[0] for row in table["data"]] == [make_record(n).trace_id for n in range(4)]
    assert json.loads((run / DELIVERED).read_text()) == [make_record(n).trace_id for n in range(4)]
    assert any((run / "artifacts/staging").iterdir())  # what `wandb sync` uploads is nowhere but in the run's folder
    assert not (tmp_path / "elsewhere").exists() and os.environ["WANDB_DATA_DIR"] == str(tmp_path / "elsewhere")


KILLED = """
import os, signal, sys
from pathlib import Path
from tasks import files
from tasks.traces.queue import FileQueue
from tasks.traces.run import drain_traces
from tasks.traces.spec import DrainSpec
from tasks.traces.wandb_sink import WandbOfflineSink
when, real = sys.argv[2], files.write_json
def write_json(path, value):
    if path.name == "delivered.json":
        if when == "after":
            real(path, value)
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, value)
files.write_json = write_json
folder = Path(sys.argv[1])
drain_traces(FileQueue(folder / "q.jsonl"), WandbOfflineSink(folder / "runs", "tatara"), DrainSpec())
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_drain_killed_around_the_end_of_its_run_counts_each_record_once(tmp_path, make_record, root, when):
    queue = FileQueue(tmp_path / "q.jsonl")
    queue.append(make_record(n).to_line() for n in range(3))
    argv = [sys.executable, "-c", KILLED, str(tmp_path), when]
    killed = subprocess.run(argv, env={**os.environ, "PYTHONPATH": str(root)}, timeout=60)
    assert killed.returncode == -9
    report = drain_traces(queue, WandbOfflineSink(tmp_path / "runs", "tatara"), DrainSpec())
    assert (report.num_delivered, report.num_already_there) == ((3, 0) if when == "before" else (0, 3))
    runs = sorted(path.name.split("-")[0] for path in (tmp_path / "runs" / "wandb").glob("*run-*") if path.is_dir())
    assert runs == (["abandoned", "offline"] if when == "before" else ["offline"])
    counted = [json.loads(Path(marker).read_text()) for marker in (tmp_path / "runs").rglob(DELIVERED)]
    assert [len(names) for names in counted] == [3]
