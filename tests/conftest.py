"""A clean environment for every test: no account, no network but loopback, a home of its own."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.ports import free_port as take_port

if TYPE_CHECKING:
    from tasks.traces.queue import FileQueue

_SECRETS = ("HF_TOKEN", "HF_REPO_NAME", "WANDB_API_KEY", "REDIS_URL", "PREFECT_API_URL", "MODEL_DIR", "VLLM_URL")
_SECRETS += ("TATARA_REMOTE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL")
# On a busy machine the same example takes ten times as long: neither is a fault of the code.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    DO_NOT_TRACK="1",
    WANDB_MODE="offline",
    WANDB_ERROR_REPORTING="false",  # weave, which TRL imports, would wait at each exit until Sentry can't be reached
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    TOKENIZERS_PARALLELISM="false",
)


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the developer's secrets and paths away; give each test its own TATARA_HOME and its own trace queue."""
    for name in _SECRETS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TATARA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FILE_QUEUE_PATH", str(tmp_path / "traces.jsonl"))  # else the one of where the tests are run


@pytest.fixture(scope="session")
def harmony_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the gpt-oss tokenizer, built once for all test processes; below `<root>/tokenizers`."""
    from tasks.gptoss.tokenizer import shared_tokenizer

    return shared_tokenizer(_common_folder(tmp_path_factory))


def _common_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture
def free_ports() -> list[int]:
    """Two ports that nobody listens on."""
    return [take_port(), take_port()]


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on."""
    return take_port()


@pytest.fixture
def queue(tmp_path: Path) -> Iterator["FileQueue"]:
    """An empty trace queue."""
    from tasks.traces.queue import FileQueue  # here: the other tests need not import it

    made = FileQueue(tmp_path / "q.jsonl")
    yield made
    made.close()
