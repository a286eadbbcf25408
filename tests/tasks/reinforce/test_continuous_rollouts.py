"""GRPO whose rollouts transformers' continuous batching generates: the adapter's own, and a killed run's too."""

from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts import ArtifactStore, TrainedAdapter
from tasks.metrics import read_metrics
from tasks.reinforce.run import reinforce_adapter
from tasks.specs import change
from tests.tasks.reinforce import runs

pytestmark = pytest.mark.long

SPEC = change(runs.SPEC, {"rollouts": "continuous", "rows_per_device": 16, "rewards": runs.DYING})


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ArtifactStore, Any, Any]:
    folder = tmp_path_factory.mktemp("continuous")
    store = ArtifactStore(folder / "home")
    return (store, *runs.make_artifacts(store, folder / "sources"))


@pytest.fixture(scope="module")
def learnt(parts: Any) -> TrainedAdapter:
    store, packed, base = parts
    return reinforce_adapter(packed, base, SPEC, store, lambda record: None)


def test_what_is_generated_is_what_the_live_adapter_would_say(learnt: TrainedAdapter):
    records = read_metrics(Path(learnt.folder) / "metrics.jsonl")
    assert len(records) == SPEC.max_steps
    for record in records[1:]:  # at the first step the adapter changes nothing
        assert record["adapter_share"] == pytest.approx(1, abs=1e-3), record
        assert record["ratio_min"] > 0.999 and record["ratio_max"] < 1.001
    assert records[-1]["reward"] > records[0]["reward"]
    assert "by transformers' continuous batching" in (Path(learnt.folder) / "output.log").read_text()


def test_a_killed_run_is_the_same_run(parts: Any, learnt: TrainedAdapter, tmp_path: Path):
    _, packed, base = parts
    runs.assert_a_killed_run_is_the_same(packed, base, SPEC, learnt, tmp_path / "home")
