"""A GRPO run that was killed is the run that was never interrupted, to the bit, and its CSVs hold each step once."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tasks.reinforce.streams import read_rows
from tests.tasks.reinforce import runs as subject
from tests.tasks.reinforce.runs import SPEC

pytestmark = pytest.mark.long

TIMES = {"rollout_s", "score_s", "learn_s", "rollout_tokens_per_s", "learnt_tokens_per_s", "peak_bytes", "time"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return subject.make_inputs(tmp_path_factory.mktemp("inputs"))


def told(folder: Path) -> tuple[Any, ...]:
    """What must be the same of two runs."""
    metrics = [
        {name: value for name, value in row.items() if name not in TIMES} for row in read_rows(folder / "metrics.csv")
    ]
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return metrics, (folder / "generations.csv").read_bytes(), hashlib.sha256(adapter).hexdigest()


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_iterations": 2, "beta": 0.05}, {"num_generations": 4, "rows_per_device": 24}],
    ids=["plain", "two-iterations-and-kl", "in-the-second-epoch"],
)
def test_killed_twice_it_is_the_same_run(inputs: dict[str, Any], tmp_path: Path, changes: dict[str, Any]):
    spec = SPEC.model_copy(update={"max_steps": 8, **changes})
    assert subject.run(inputs, tmp_path / "whole", spec).get("num_steps") == 8
    for step in (3, 5):
        subject.kill_at(subject.start(inputs, tmp_path / "killed", spec), tmp_path / "killed", step)
        assert subject.last_step(tmp_path / "killed") >= step
    with (tmp_path / "killed" / "generations.csv").open("ab") as torn:
        torn.write(b'6,1,"a question that was never clo\nsed, 1')
    assert subject.run(inputs, tmp_path / "killed", spec).get("num_steps") == 8
    assert "resuming from checkpoint-" in (tmp_path / "killed" / "output.log").read_text()
    assert told(tmp_path / "killed") == told(tmp_path / "whole")
