"""A real worker and its flow run killed with SIGKILL in each of the seven steps; brought back as `tatara up` does.

Chaos (about four minutes): `make chaos-test`. test_line_killed.py kills the flow's process in two of them.
"""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deployments import orchestration
from deployments.lost_runs import settle_lost_runs
from flows.recipes import resolve
from tasks import files, processes
from tasks.artifacts import ArtifactStore, HealthReport, MergedModel, PublishedModel
from tasks.serve import services
from tasks.serve.settings import ServiceSettings
from tasks.specs import ServeSpec, change
from tests.flows.line import (
    STEPS,
    is_made,
    make_inputs,
    need_vllm,
    run_to_merge,
    wait_for_step,
)
from tests.ports import free_port
from tests.waiting import wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]


@dataclass(frozen=True)
class Host:
    """A machine with our Prefect on it."""

    prefect: orchestration.Prefect
    store: ArtifactStore
    changes: dict[str, Any]
    merged_digest: str

    @property
    def worker(self) -> Path:
        return self.prefect.identity("worker")

    def up(self) -> list[str]:
        """What `tatara up` does, and what it calls lost."""
        orchestration.start_server(self.prefect)
        orchestration.deploy(self.prefect)
        lost = settle_lost_runs(self.prefect, "local")
        orchestration.start_worker(self.prefect)
        return lost

    def ask(self, **changes: Any) -> str:
        """Ask for a run of finetune/tiny, as a person does."""
        deployment = orchestration.call(self.prefect, "/deployments/name/finetune/tiny")
        wanted = {"parameters": {"recipe": "tiny", "changes": {**self.changes, **changes}}}
        return orchestration.call(self.prefect, f"/deployments/{deployment['id']}/create_flow_run", wanted)["id"]

    def state(self, run: str) -> str:
        return orchestration.call(self.prefect, f"/flow_runs/{run}")["state_type"]

    def wait_for_end(self, run: str) -> str:
        deadline = time.monotonic() + 400
        while (state := self.state(run)) not in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.5)
        return state

    def log(self) -> str:
        return (self.prefect.home / "worker.log").read_text()[-3000:]

    def kill(self) -> int:
        """SIGKILL the worker and every flow run of its; return how many processes that were."""
        members = processes.find_members(self.worker, processes.find_alive(self.worker))
        for pid in members:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not processes.find_members(self.worker, processes.find_alive(self.worker)), 90.0)
        return len(members)


def host_services(spec: ServeSpec, home: Path, model: str = "") -> ServiceSettings:
    return ServiceSettings(model=model, spec=spec, home=home)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, harmony_tokenizer: Path) -> Iterator[Host]:
    need_vllm()
    tmp_path = tmp_path_factory.mktemp("host")
    changes, recipe, variables = make_inputs(tmp_path, harmony_tokenizer)
    given = {**variables, "PREFECT_SERVER_API_PORT": str(free_port())}
    prefect = orchestration.find_prefect(given)
    digest = run_to_merge(recipe, ArtifactStore(tmp_path / "uninterrupted")).model_digest
    try:
        yield Host(prefect, ArtifactStore(tmp_path / "home"), changes, digest)
    finally:
        orchestration.stop(prefect)
        services.stop(host_services(recipe.serve, tmp_path / "home"))


def test_a_worker_killed_in_each_step_is_brought_back_and_ends_with_the_same_verified_result(host: Host):
    host.up()
    unfinished: set[str] = set()
    for step in STEPS:
        run = host.ask()
        assert wait_for_step(host.store, step, lambda: processes.find_alive(host.worker) is not None), host.log()
        assert host.kill() >= 2  # the worker and its flow run at least
        unfinished |= set() if is_made(host.store, step) else {step}
        assert host.state(run) == "RUNNING"  # nobody was left to say otherwise
        assert "finetune-tiny" in host.up()  # the drain of every five minutes may be another
        assert host.state(run) == "CRASHED"
    assert unfinished >= {"pack", "train", "serve", "verify"}  # the others may be done before the signal arrives

    assert host.wait_for_end(host.ask()) == "COMPLETED", host.log()
    report = host.store.committed(HealthReport)[-1]
    assert report.passed
    assert host.store.ancestor(report, MergedModel).model_digest == host.merged_digest


def test_a_server_that_was_stopped_is_there_again_for_the_shell_that_exported_its_address(host: Host):
    assert orchestration.stop(host.prefect) == ["prefect worker", "prefect server"]
    given = {name: value for name, value in host.prefect.variables.items() if name != "PREFECT_SERVER_API_PORT"}
    exported = orchestration.find_prefect({**given, "PREFECT_API_URL": host.prefect.api_url})
    orchestration.start_server(exported)
    assert orchestration.deploy(exported) is False


def test_what_made_way_for_a_run_that_fails_is_served_again(host: Host):
    """As a GPU is freed for the trainer; the end of the failed run brings the verified model back."""
    spec = change(resolve("tiny"), host.changes).serve
    published = host.store.committed(PublishedModel)[-1]
    settings = host_services(spec, host.store.root, published.model_folder)
    assert services.status(settings).is_ready
    files.write_json(settings.vacancy, {})
    assert processes.stop(settings.identity_file("vllm"))
    host.up()
    assert host.wait_for_end(host.ask(fetch={"source": "no/such/file.jsonl"})) == "FAILED"
    wait_for(lambda: services.status(settings).is_ready, timeout_s=120)
    assert services.status(settings).vllm.model == published.model_folder
    wait_for(lambda: not settings.vacancy.exists(), timeout_s=30)  # removed once vLLM and gateway answer
