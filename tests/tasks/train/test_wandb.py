"""W&B beside a training: offline without a key, one run over a resume, and no other secret in the trainer."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks import procfs
from tasks.artifacts import ArtifactStore
from tasks.metrics import read_metrics
from tasks.train.run import train_adapter, wandb_variables
from tests.tasks.train.runs import SPEC, make_artifacts


def test_without_a_key_the_run_is_kept_offline():
    given = {"PATH": "/bin", "HF_TOKEN": "secret", "WANDB_ENTITY": "us"}
    own = wandb_variables(given, "0123456789abcdef0123", Path("/home"))
    assert own["WANDB_MODE"] == "offline" and own["WANDB_ENTITY"] == "us" and own["WANDB_RUN_ID"] == "0123456789abcdef"
    assert not {"HF_TOKEN", "PATH"} & own.keys()


def test_with_a_key_it_is_online_where_the_person_says():
    own = wandb_variables({"WANDB_API_KEY": "k", "WANDB_PROJECT": "mine"}, "0" * 20, Path("/home"))
    assert "WANDB_MODE" not in own and (own["WANDB_PROJECT"], own["WANDB_API_KEY"]) == ("mine", "k")


@pytest.mark.chaos
def test_an_offline_run_holds_the_losses_and_no_secret_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    store = ArtifactStore(tmp_path / "home")
    packed, base = make_artifacts(store, tmp_path)
    seen: list[dict[str, str]] = []

    def look(record: dict[str, Any]) -> None:
        (identity,) = (store.root / "adapter").glob("*/process.json")
        seen.append(procfs.read_variables(json.loads(identity.read_text())["pid"]))

    spec = SPEC.model_copy(update={"max_steps": 4, "report_to": "wandb"})
    adapter = train_adapter(packed, base, spec, store, look)
    assert any("WANDB_RUN_ID" in variables for variables in seen)
    assert not any("HF_TOKEN" in variables or "hf_verysecret" in str(variables) for variables in seen)
    (run,) = (store.root / "wandb").glob("offline-run-*")
    assert run.name.endswith(adapter.key[:16])
    inspect = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(run)]
    told = subprocess.run(inspect, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    for record in read_metrics(adapter.path / "metrics.jsonl"):
        assert str(round(record["loss"], 4))[:6] in told.stdout
