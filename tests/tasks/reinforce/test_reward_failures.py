"""A user's reward that fails in the worker: told as what it is, and nothing that was learnt is lost."""

from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts import ArtifactStore, BaseCheckpoint, PackedDataset, TrainedAdapter
from tasks.errors import RewardError
from tasks.reinforce.run import reinforce_adapter
from tasks.reinforce.streams import read_rows
from tasks.specs import ReinforceSpec, change
from tests.tasks.reinforce import runs

pytestmark = pytest.mark.long

SPEC = runs.SPEC.model_copy(update={"max_steps": 5, "save_steps": 100, "rows_per_device": 8})


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[PackedDataset, BaseCheckpoint]:
    folder = tmp_path_factory.mktemp("parts")
    return runs.make_artifacts(ArtifactStore(folder / "home"), folder / "sources")


def with_own(name: str, **changes: Any) -> ReinforceSpec:
    return change(SPEC, {"rewards": [{"name": f"tests.tasks.reinforce.broken_rewards:{name}"}], **changes})


def learn(parts: Any, spec: ReinforceSpec, home: Path) -> TrainedAdapter:
    return reinforce_adapter(*parts, spec, ArtifactStore(home), lambda record: None)


def test_a_reward_that_fails_costs_no_step_and_changes_nothing(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its service or its file was away, say: the run goes on from the step before, and is then the same run."""
    mended = tmp_path / "mended"
    monkeypatch.setenv("MENDED", str(mended))
    spec = with_own("fail_in_the_fourth")
    with pytest.raises(RewardError) as error:
        learn(parts, spec, tmp_path / "home")
    told = str(error.value)
    assert (
        "your reward tests.tasks.reinforce.broken_rewards:fail_in_the_fourth failed: LookupError: the price" in told
        and "\\ud83d" in told
    )
    assert "at broken_rewards.py:" in told and "about 8 completions of the questions" in told and "output.log" in told
    [folder] = (tmp_path / "home" / "adapter").glob("[0-9a-f]*")
    assert [path.name for path in (folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]
    assert [int(row["step"]) for row in read_rows(folder / "metrics.csv")] == [1, 2, 3]
    assert [int(row["step"]) for row in read_rows(folder / "generations.csv")] == [1] * 8 + [2] * 8 + [3] * 8
    mended.touch()
    again, whole = (learn(parts, spec, tmp_path / name) for name in ("home", "whole"))
    assert "resuming from checkpoint-3" in (folder / "output.log").read_text()
    for name in ("adapter/adapter_model.safetensors", "generations.csv"):
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes(), name


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("leave", {}, r"your reward \S+:leave ended the process \(sys.exit\(2\) at broken_rewards.py:\d+\): raise an"),
        ("die", {}, r"the process ended inside the reward die: see that it neither ends .*died without a result"),
        pytest.param(
            "hang",
            {"stall_timeout_s": 20.0, "stop_grace_s": 1.0},
            r"the reward hang did not come back: .*raise ReinforceSpec.stall_timeout_s \(20 s\)\. .*phase reward hang",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_reward_that_ends_or_holds_the_process_is_named(
    name: str, changes: dict[str, Any], says: str, parts: Any, tmp_path: Path
):
    with pytest.raises(RewardError, match=says):
        learn(parts, with_own(name, **changes), tmp_path)


def test_a_reward_may_print_be_slow_and_empty_its_arguments(parts: Any, tmp_path: Path):
    adapter = learn(parts, with_own("talk", max_steps=2), tmp_path)
    rows = read_rows(adapter.path / "generations.csv")
    assert len(rows) == 16 and all(row["question"] for row in rows) and any(row["completion"] for row in rows)
