"""The line with real vLLM, once for each module that asks for it."""

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tasks.artifacts import ArtifactStore, HealthReport
from tasks.serve import services
from tasks.serve.settings import ServiceSettings
from tasks.specs import Recipe
from tests.flows.line import ROOT, make_inputs, need_vllm
from tests.ports import free_port
from tests.waiting import wait_for

PREFECT = (sys.executable, "-m", "prefect")


@dataclass(frozen=True)
class Line:
    """Where the line runs, its recipe and environment."""

    folder: Path
    store: ArtifactStore
    changes: dict
    recipe: Recipe
    env: dict[str, str]

    def start(self, log: Path) -> subprocess.Popen[bytes]:
        """Run the flow in a process of its own."""
        code = f"from flows.finetune import finetune; finetune('tiny', {self.changes!r})"
        with log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-c", code], env=self.env, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )


def _is_answering(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, harmony_tokenizer: Path) -> Iterator[Line]:
    """A small base, a recipe on it, a Prefect server; nothing has run yet."""
    need_vllm()
    folder = tmp_path_factory.mktemp("line")
    changes, recipe, variables = make_inputs(folder, harmony_tokenizer)
    prefect_port = free_port()
    env = {
        **variables,
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{prefect_port}/api",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "tasks",
        "PYTHONPATH": str(ROOT),
    }
    server = subprocess.Popen(
        [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port), "--no-services", "--no-ui"],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: _is_answering(f"{env['PREFECT_API_URL']}/health"), 120)
        yield Line(folder, ArtifactStore(folder / "home"), changes, recipe, env)
    finally:
        services.stop(ServiceSettings(model="", spec=recipe.serve, home=folder / "home"))
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def verified(line: Line) -> Line:
    """The line after a run to its verified end."""
    reports = line.store.committed(HealthReport)
    if not (reports and reports[-1].passed):
        log = line.folder / "whole.log"
        assert line.start(log).wait(timeout=400) == 0, log.read_text()[-3000:]
    return line
