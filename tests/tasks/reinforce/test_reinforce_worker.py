"""GRPO on a tiny gpt-oss: the reward rises, what is told is right, and rollouts of another model end the run."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.reinforce.columns import generations_columns, metrics_columns
from tasks.reinforce.streams import read_rows
from tests.tasks.reinforce import runs as subject
from tests.tasks.reinforce.runs import SPEC

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return subject.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def learnt(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24 steps."""
    folder = tmp_path_factory.mktemp("learnt")
    told = subject.run(inputs, folder, SPEC.model_copy(update={"max_steps": 24, "save_steps": 24}))
    assert told.get("num_steps") == 24, told
    return folder


def column(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in read_rows(folder / "metrics.csv") if row[name]]


def test_the_mean_reward_rises_clearly(learnt: Path):
    rewards = column(learnt, "reward")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.5, rewards
    told = json.loads((learnt / "result.json").read_text())
    assert told["reward_before"] == pytest.approx(sum(rewards[:2]) / 2)
    assert told["reward_after"] == pytest.approx(sum(rewards[-2:]) / 2)


def test_rollouts_come_from_the_model_that_learns(learnt: Path):
    """Generation with a cache and one token at a time, and the learning pass: the same log-probabilities."""
    assert all(abs(ratio - 1) < 1e-3 for ratio in column(learnt, "ratio_mean"))
    assert max(column(learnt, "ratio_max")) < 1.01 and min(column(learnt, "ratio_min")) > 0.99
    shares = column(learnt, "adapter_share")
    assert len(shares) >= 22 and all(share == pytest.approx(1, abs=1e-2) for share in shares[2:])
    assert column(learnt, "adapter_change")[0] < 1e-6 < column(learnt, "adapter_change")[-1]


def test_the_streams_hold_every_step_and_completion(learnt: Path):
    metrics, generations = (read_rows(learnt / name) for name in ("metrics.csv", "generations.csv"))
    assert tuple(metrics[0]) == metrics_columns(SPEC) and tuple(generations[0]) == generations_columns(SPEC)
    assert [int(row["step"]) for row in metrics] == list(range(1, 25))
    assert [int(row["step"]) for row in generations] == [step for step in range(1, 25) for _ in range(32)]
    for row in metrics:
        of_step = [each for each in generations if each["step"] == row["step"]]
        for name in ("digits", "length"):
            values = [float(each[name]) for each in of_step]
            assert float(row[f"{name}_mean"]) == pytest.approx(sum(values) / 32, abs=1e-5)
        assert float(row["reward"]) == pytest.approx(sum(float(each["reward"]) for each in of_step) / 32, abs=1e-5)
        assert sum(int(each["num_tokens"]) for each in of_step) / 32 == pytest.approx(float(row["completion_tokens"]))
    first = generations[0]
    assert first["question"].endswith("=?") and first["answer"].isdecimal()
    assert float(first["reward"]) == pytest.approx(float(first["digits"]) + 0.5 * float(first["length"]))
    assert sum(float(row["advantage"]) for row in generations[:8]) == pytest.approx(0, abs=1e-3)  # of one prompt


def test_a_run_whose_rollouts_ignore_the_adapter_is_stopped(inputs: dict[str, Any], tmp_path: Path):
    told = subject.run(inputs, tmp_path, SPEC.model_copy(update={"max_steps": 12}), "ignore_the_adapter")
    assert told.get("error") == "RolloutError", told
    assert "ignore the adapter" in told["message"] and "rollouts='transformers'" in told["message"]
    assert 1 <= subject.last_step(tmp_path) <= 4  # found as soon as the adapter differs from nothing
    assert not (tmp_path / "adapter").exists()


def test_rollouts_without_the_experts_adapter_show_less_than_the_whole(inputs: dict[str, Any], tmp_path: Path):
    told = subject.run(inputs, tmp_path, SPEC.model_copy(update={"min_adapter_share": 0.0}), "drop_the_experts")
    assert told.get("num_steps") == 6, told
    assert all(share < 0.97 for share in column(tmp_path, "adapter_share")[2:])


def test_completions_of_one_prompt_are_compared_with_each_other(learnt: Path):
    rows = read_rows(learnt / "generations.csv")
    assert all(len({row["prompt"] for row in rows[start : start + 8]}) == 1 for start in range(0, len(rows), 8))
