"""The flow `publish`, run by Prefect against the loopback Hub: an adapter that exists goes there, without a merge."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.artifacts import ArtifactStore, MergedModel, PublishedModel, TrainedAdapter
from tests.hub_server import (
    READ,
    WRITE,
    HubServer,
    client_environment,
    hub_fixture,  # noqa: F401  (the fixture `hub`)
)
from tests.tasks.publish.conftest import make_merged

pytestmark = pytest.mark.slow  # Prefect's own server is started for each
_RUN = """
import sys
from prefect.testing.utilities import prefect_test_harness
from flows.publish import publish
with prefect_test_harness(server_startup_timeout=120):
    made = publish(sys.argv[1], changes={"publish": {"repo_id": "ada/tuned", "what": sys.argv[2]}})
    print("COMMIT", made.commit)
"""


def run(hub: HubServer, store: ArtifactStore, home: Path, key: str, what: str, token: str) -> tuple[str, str]:
    """Return (commit, all that was said)."""
    env = {**os.environ, **client_environment(hub, home / "hf"), "PREFECT_HOME": str(home / "prefect")}
    env |= {"TATARA_HOME": str(store.root), "HF_TOKEN": token, "PREFECT_LOGGING_EXTRA_LOGGERS": "tasks"}
    done = subprocess.run([sys.executable, "-c", _RUN, key, what], capture_output=True, text=True, env=env, timeout=240)
    said = done.stdout + done.stderr
    assert token not in said
    return done.stdout.rpartition("COMMIT ")[2].strip() if done.returncode == 0 else "", said


def test_an_adapter_goes_there_and_a_second_run_sends_nothing(hub: HubServer, tmp_path: Path):
    store = ArtifactStore(tmp_path / "store")
    adapter = store.ancestor(make_merged(store), TrainedAdapter)
    commit, said = run(hub, store, tmp_path, adapter.short, "adapter", WRITE)
    assert commit == hub.repos["model", "ada/tuned"].branches["main"], said[-3000:]
    assert "adapter_model.safetensors" in hub.content("model", "ada/tuned")
    assert "publish: adapter as ada to ada/tuned" in said or "Finished" in said
    assert len(store.committed(MergedModel)) == 1  # the one that was there: nothing was merged for it
    hub.requests.clear()
    assert run(hub, store, tmp_path, adapter.short, "adapter", WRITE)[0] == commit and hub.writes() == []


def test_a_read_only_token_is_said_once(hub: HubServer, tmp_path: Path):
    store = ArtifactStore(tmp_path / "store")
    adapter = store.ancestor(make_merged(store), TrainedAdapter)
    commit, said = run(hub, store, tmp_path, adapter.short, "adapter", READ)
    assert not commit and "403, the token of ada is read-only; it needs write access" in said
    assert hub.count("GET", "/whoami-v2$") == 1  # neither the check nor the step was tried again
    assert hub.writes() == [] and store.committed(PublishedModel) == []
