"""A pretraining's page: renewed in place, from what the trainer has written so far."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.metrics import append_metrics
from tasks.prefect_ui import Live
from tasks.pretrain.live import look
from tasks.pretrain.report import live_markdown

RECORD = {"num_steps": 9, "loss": 2.0, "accuracy": 0.25, "learning_rate": 1e-3, "peak_host_bytes": 2 * 10**9}


def test_only_what_is_there_is_shown(tmp_path: Path):
    assert look(tmp_path) == {"pretrain-live": "No step is logged yet."}
    append_metrics(tmp_path / "metrics.jsonl", {**RECORD, "step": 1, "seconds_left": 61.0})
    shown = look(tmp_path)
    assert set(shown) == {"pretrain-live", "pretrain-loss", "pretrain-memory"}
    assert str(shown["pretrain-live"]).startswith("# Step 1 of 9, 2 min left\n")
    append_metrics(tmp_path / "experts.jsonl", {"step": 1, "usage": [[0.5, 0.5], [1.0, 0.0]]})
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 2, "lo')  # the trainer writes just now
    shown = look(tmp_path)
    assert isinstance(shown["pretrain-experts"], bytes)
    assert "normalised entropy of each layer 1.000, 0.000" in str(shown["pretrain-live"])


def test_the_newest_records_come_first_and_unknown_figures_are_left_empty():
    records = [{**RECORD, "step": step, "tokens_per_s": 17_310, "mfu_pct": 31.25} for step in range(1, 30)]
    rows = live_markdown(records).splitlines()[4:]
    assert rows[0] == "| 29 | 2.0000 | 7.39 | 0.250 | 1.00e-03 | 17,310 | 31.2 % | 2.00 |"
    assert len(rows) == 12
    assert live_markdown([{"step": 1, "loss": 1e4}]).splitlines()[4].startswith("| 1 | 10000.0000 | ")  # no overflow


def test_a_server_that_is_away_is_not_asked_at_each_record():
    looks: list[int] = []

    def look() -> dict[str, str | bytes]:
        looks.append(1)
        raise ConnectionError

    live = Live(look, every_s=3600)
    for step in (1, 2, 3):
        live({**RECORD, "step": step})
    assert len(looks) == 1


_RENEWED = """
import json, sys
from pathlib import Path
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.testing.utilities import prefect_test_harness
from tasks.metrics import append_metrics
from tasks.pretrain.live import look
from tasks.prefect_ui import Live

folder, record = Path(sys.argv[1]), json.loads(sys.argv[2])
looks = []

@flow
def train():
    live = Live(lambda: (looks.append(1), look(folder))[1], every_s=3600)
    for step in (1, 2, 3):
        append_metrics(folder / "metrics.jsonl", {**record, "step": step})
        live({**record, "step": step})
    live.renew()

with prefect_test_harness(server_startup_timeout=120):
    train()
    with get_client(sync_client=True) as client:
        said = [(a.key, a.type, len(a.data), str(a.data)[:14]) for a in client.read_artifacts()]
print("SAID" + json.dumps([len(looks), sorted(said)]))
"""


@pytest.mark.chaos  # Prefect's own server is started
def test_pictures_are_renewed_in_place(tmp_path: Path):
    env = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")}
    command = [sys.executable, "-c", _RENEWED, str(tmp_path), json.dumps(RECORD)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    said = [line.partition("SAID")[2] for line in done.stdout.splitlines() if "SAID" in line]
    assert said, done.stdout + done.stderr
    num_looks, artifacts = json.loads(said[0])
    assert num_looks == 2  # at the first record, and at the end
    assert [(key, kind) for key, kind, _, _ in artifacts] == [
        ("pretrain-live", "markdown"),
        ("pretrain-loss", "image"),
        ("pretrain-memory", "image"),
    ]
    assert artifacts[0][3] == "# Step 3 of 9\n"  # what was there last, once
    assert artifacts[1][3] == "data:image/png"
