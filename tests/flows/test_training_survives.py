"""A real Prefect server and process worker: what dies around a training does not end it, and a cancel does.

Slow (two to four minutes): the real task train_adapter on a tiny gpt-oss, started by a real worker.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deployments import orchestration
from tasks import processes
from tasks.artifacts import ArtifactStore, BaseCheckpoint, PackedDataset, TrainedAdapter
from tasks.checkpoints import checkpoint_step, latest_checkpoint
from tasks.metrics import read_metrics
from tests.ports import free_port
from tests.tasks.train.runs import SPEC, make_artifacts
from tests.waiting import runs, wait_for

NUM_STEPS = 500  # a second or so for each twenty: longer than a worker and a flow run take to start
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
FLOW = """
from prefect import flow

from tasks.artifacts import BaseCheckpoint, PackedDataset
from tasks.specs import TrainSpec
from tasks.train.task import train_adapter


@flow(name="train-only")
def train_only(packed: dict, base: dict, spec: dict):
    train_adapter(PackedDataset(**packed), BaseCheckpoint(**base), TrainSpec(**spec))
"""


@dataclass(frozen=True)
class Place:
    """One Prefect, one store, one deployment."""

    prefect: orchestration.Prefect
    store: ArtifactStore
    packed: PackedDataset
    base: BaseCheckpoint
    deployment: str

    def start(self, seed: int) -> str:
        """Create a flow run; each seed is a training of its own. It saves at its end only, if nobody asks."""
        spec = SPEC.model_copy(update={"seed": seed, "max_steps": NUM_STEPS, "save_steps": 1000})
        parameters = {
            "packed": self.packed.model_dump(mode="json"),
            "base": self.base.model_dump(mode="json"),
            "spec": spec.model_dump(mode="json"),
        }
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return self.call(f"/deployments/{self.deployment}/create_flow_run", body)["id"]

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return orchestration.call(self.prefect, path, body, "GET" if body is None else "POST")

    def state(self, run: str) -> str:
        return self.call(f"/flow_runs/{run}")["state"]["type"]

    def log(self, run: str) -> str:
        body = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200, "sort": "TIMESTAMP_ASC"}
        return "\n".join(line["message"] for line in self.call("/logs/filter", body))

    def training(self, steps: int = 3) -> Path:
        """Wait until a training is under way that was not there before; return its folder."""
        found: list[Path] = []

        def is_there() -> bool:
            for folder in (self.store.root / "adapter").glob("[!.]*"):
                if not (folder / "manifest.json").exists() and len(read_metrics(folder / "metrics.jsonl")) >= steps:
                    found.append(folder)
            return bool(found)

        wait_for(is_there, 180)
        return found[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("survives")
    given = {**os.environ, "TATARA_HOME": str(folder / "home"), "PREFECT_SERVER_API_PORT": str(free_port())}
    given.pop("PREFECT_API_URL", None)
    prefect = orchestration.find_prefect(given)
    store = ArtifactStore(folder / "home")
    packed, base = make_artifacts(store, folder)
    (folder / "train_only.py").write_text(FLOW)
    try:
        orchestration.start_server(prefect)
        create = prefect.command("work-pool", "create", "local", "--type", "process")
        subprocess.run(create, env=prefect.variables, check=True, capture_output=True)
        flow = orchestration.call(prefect, "/flows/", {"name": "train-only"})["id"]
        deployment = orchestration.call(
            prefect,
            "/deployments/",
            {
                "name": "test",
                "flow_id": flow,
                "work_pool_name": "local",
                "path": str(folder),
                "entrypoint": "train_only.py:train_only",
                "enforce_parameter_schema": False,
                "pull_steps": [{"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}}],
            },
        )["id"]
        orchestration.start_worker(prefect)
        yield Place(prefect, store, packed, base, deployment)
    finally:
        orchestration.stop(prefect)
        for identity in (folder / "home").glob("adapter/*/process.json"):
            processes.stop(identity, 2)


def test_cancelled_in_the_ui_it_leaves_a_checkpoint_and_no_process(place: Place):
    run = place.start(seed=1)
    folder = place.training()
    trainer = processes.find_alive(folder / "process.json")
    assert trainer is not None
    members = processes.find_members(folder / "process.json", trainer)
    cancelling = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
    place.call(f"/flow_runs/{run}/set_state", cancelling)
    began = time.monotonic()
    wait_for(lambda: not runs(trainer.pid), 60)
    assert time.monotonic() - began < 45
    wait_for(lambda: place.state(run) == "CANCELLED", 60)
    assert not any(runs(pid) for pid in members)
    step = checkpoint_step(latest_checkpoint(folder / "checkpoints"))
    assert step == read_metrics(folder / "metrics.jsonl")[-1]["step"] >= 3  # that of the cancel: none was lost
    assert step < NUM_STEPS
    again = place.start(seed=1)
    wait_for(lambda: place.state(again) in {"COMPLETED", "FAILED", "CRASHED"}, 240)
    assert place.state(again) == "COMPLETED"
    assert f"resuming from checkpoint-{step}" in place.log(again)


def test_a_killed_worker_leaves_the_trainer_and_the_next_run_follows_it(place: Place):
    place.start(seed=2)
    folder = place.training()
    trainer = processes.find_alive(folder / "process.json")
    worker = processes.find_alive(place.prefect.identity("worker"))
    assert trainer is not None and worker is not None
    for pid in processes.find_members(place.prefect.identity("worker"), worker):
        if pid != trainer.pid:
            os.kill(pid, signal.SIGKILL)
    before = len(read_metrics(folder / "metrics.jsonl"))
    wait_for(lambda: len(read_metrics(folder / "metrics.jsonl")) > before + 2, 60)
    assert trainer.is_alive()
    orchestration.start_worker(place.prefect)
    again = place.start(seed=2)
    wait_for(lambda: place.state(again) in {"COMPLETED", "FAILED", "CRASHED"}, 240)
    assert place.state(again) == "COMPLETED"
    assert f"attached to pid {trainer.pid}, which an earlier try left running" in place.log(again)
    assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == list(range(1, NUM_STEPS + 1))
    assert (folder / "output.log").read_text().count(f"step 1/{NUM_STEPS}") == 1


def test_a_killed_server_leaves_the_training_and_the_run_ends_when_it_is_back(place: Place):
    run = place.start(seed=3)
    folder = place.training()
    trainer = processes.find_alive(folder / "process.json")
    server = processes.find_alive(place.prefect.identity("server"))
    assert trainer is not None and server is not None
    for pid in processes.find_members(place.prefect.identity("server"), server):
        os.kill(pid, signal.SIGKILL)
    before = len(read_metrics(folder / "metrics.jsonl"))
    wait_for(lambda: len(read_metrics(folder / "metrics.jsonl")) > before + 10, 60)
    assert trainer.is_alive()
    orchestration.start_server(place.prefect)
    wait_for(lambda: place.state(run) in {"COMPLETED", "FAILED", "CRASHED"}, 240)
    assert place.state(run) == "COMPLETED"
    assert place.store.committed(TrainedAdapter)[-1].folder == str(folder)
    assert (folder / "output.log").read_text().count(f"step 1/{NUM_STEPS}") == 1
