"""What starts often starts light: looked at in a fresh interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEARNING = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "vllm", "safetensors", "bitsandbytes"}
PLOTTING = {"matplotlib", "pyarrow", "wandb", "weave"}


def _loaded(statement: str) -> set[str]:
    """Return the top-level modules after `statement`."""
    code = f"{statement}\nimport sys, json; print(json.dumps(list({{name.partition('.')[0] for name in sys.modules}})))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("flow", ["finetune", "pretrain, flows.release, flows.drain, flows.evaluation"])
def test_flows_load_no_learning_library(flow: str):
    names = _loaded(f"import flows.{flow}")
    assert "prefect" in names
    assert not names & (LEARNING | PLOTTING | {"huggingface_hub"})


@pytest.mark.parametrize(
    "statement",
    ["import deployments.gateway.app", "import deployments.services, deployments.vllm.entrypoint"],
)
def test_long_running_services_load_neither_prefect_nor_torch(statement: str):
    names = _loaded(statement)
    assert "deployments" in names
    assert not names & (LEARNING | PLOTTING | {"prefect", "huggingface_hub", "flows", "blocks"})


@pytest.mark.parametrize("statement", ["import deployments.cli", "import flows.recipes, tasks.specs"])
def test_command_line_and_recipes_load_no_prefect(statement: str):
    names = _loaded(statement)
    assert not names & (LEARNING | PLOTTING | {"prefect", "huggingface_hub", "fastapi"})


def test_parents_of_trainers_load_no_torch():
    names = _loaded("import tasks.train.run, tasks.pretrain.run, tasks.trainer_job, tasks.metrics")
    assert not names & {"torch", "transformers", "prefect"}


def test_importing_the_line_loads_no_package_that_prefect_does_not():
    """What it costs beside Prefect is measured by tests/bench/bench_start.py: a time is no test on a busy machine."""
    extra = _loaded("import flows.finetune") - _loaded("from prefect import flow, task")
    assert extra == {"flows", "tasks"}
