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


def _loaded(statement: str) -> tuple[set[str], float]:
    """Return the top-level modules after `statement`, and its CPU seconds."""
    code = (
        f"import sys, time; begin = time.process_time(); {statement}; spent = time.process_time() - begin\n"
        "import json; print(json.dumps([sorted({name.partition('.')[0] for name in sys.modules}), spent]))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    names, seconds = json.loads(done.stdout.splitlines()[-1])
    return set(names), seconds


@pytest.mark.parametrize("flow", ["finetune", "pretrain, flows.release, flows.drain, flows.evaluation"])
def test_flows_load_no_learning_library(flow: str):
    names, _ = _loaded(f"import flows.{flow}")
    assert "prefect" in names
    assert not names & (LEARNING | PLOTTING | {"huggingface_hub"})


@pytest.mark.parametrize(
    "statement",
    ["import deployments.gateway.app", "import deployments.services, deployments.vllm.entrypoint"],
)
def test_long_running_services_load_neither_prefect_nor_torch(statement: str):
    names, _ = _loaded(statement)
    assert "deployments" in names
    assert not names & (LEARNING | PLOTTING | {"prefect", "huggingface_hub", "flows", "blocks"})


@pytest.mark.parametrize("statement", ["import deployments.cli", "import flows.recipes, tasks.specs"])
def test_command_line_and_recipes_load_no_prefect(statement: str):
    names, _ = _loaded(statement)
    assert not names & (LEARNING | PLOTTING | {"prefect", "huggingface_hub", "fastapi"})


def test_parents_of_trainers_load_no_torch():
    names, _ = _loaded("import tasks.train.run, tasks.pretrain.run, tasks.trainer_job, tasks.metrics")
    assert not names & {"torch", "transformers", "prefect"}


def test_importing_the_line_costs_little_more_than_prefect():
    """Both in CPU seconds, the best of three: the machine's own speed falls out."""
    ours, prefects = (
        min(_loaded(code)[1] for _ in range(3)) for code in ("import flows.finetune", "from prefect import flow, task")
    )
    assert ours < 1.4 * prefects
