"""Every Prefect task keeps the promises of handbook section 6, example 3."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from prefect import Task
from prefect.cache_policies import NO_CACHE

from tasks.errors import SpecError, TransientError

ROOT = Path(__file__).resolve().parents[2]
TASKS: dict[str, Task[..., Any]] = {
    f"{path.parent.name}.{name}": value
    for path in sorted((ROOT / "tasks").glob("*/task.py"))
    for name, value in vars(importlib.import_module(f"tasks.{path.parent.name}.task")).items()
    if isinstance(value, Task)
}
# may take days; stall_timeout_s of their specs watches them
TRAINERS = {"train.train_adapter", "pretrain.pretrain_model", "reinforce.reinforce_adapter", "ppo.reinforce_model"}


class _State:
    def __init__(self, data: object) -> None:
        self.data = data


@pytest.mark.parametrize("name", TASKS)
def test_task_has_a_name_no_result_cache_and_sane_retries(name: str):
    task = TASKS[name]
    assert task.task_run_name
    assert task.cache_policy == NO_CACHE
    assert not task.persist_result
    if task.retries:
        assert task.retry_jitter_factor
        assert task.timeout_seconds or name in TRAINERS
        assert task.retry_condition_fn is not None
        asked = [TransientError("503"), SpecError("rank"), MemoryError(), None]
        answers = [task.retry_condition_fn(task, None, _State(data)) for data in asked]  # pyright: ignore
        assert answers == [True, False, False, False]


def test_the_seven_steps_are_tasks():
    steps = {"fetch_dataset", "pack_dataset", "train_adapter", "merge_adapter", "publish_model", "serve_model"}
    assert {name.partition(".")[2] for name in TASKS} >= steps | {"verify_model", "pretrain_model", "drain_traces"}


@pytest.mark.parametrize("path", sorted((ROOT / "tasks").glob("*/task.py")), ids=lambda path: path.parent.name)
def test_task_files_are_thin(path: Path):
    limit = {"serve": 160, "check": 110}.get(path.parent.name, 80)  # several tasks each
    assert len(path.read_text().splitlines()) <= limit


@pytest.mark.parametrize("flow", ["finetune", "reinforce", "reinforce_ppo", "release", "release_base", "release_ppo"])
def test_a_flow_that_fails_serves_what_made_way_for_it_again(flow: str):
    """What the hook does is tested beside the handover, and in a real worker by `make chaos-test`."""
    found = getattr(importlib.import_module(f"flows.{flow}"), flow)
    hook = importlib.import_module("tasks.serve.task").serve_again
    assert [found.on_failure_hooks, found.on_cancellation_hooks, found.on_crashed_hooks] == [[hook]] * 3


def test_a_promotion_that_fails_is_rolled_back_first():
    found, hooks = importlib.import_module("flows.promote").promote, importlib.import_module("tasks.serve.task")
    both = [hooks.roll_back, hooks.serve_again]
    assert [found.on_failure_hooks, found.on_cancellation_hooks, found.on_crashed_hooks] == [both] * 3
