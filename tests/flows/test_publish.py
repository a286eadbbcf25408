"""The flow `publish`, run by Prefect against the loopback Hub: an adapter that exists goes there, without a merge."""

import json
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

_RUN = """
import json, os, sys
from prefect.testing.utilities import prefect_test_harness
from flows.publish import publish
changes = {"publish": {"repo_id": "ada/tuned", "what": "adapter"}}
with prefect_test_harness(server_startup_timeout=120):
    for name in ("READ", "WRITE", "WRITE"):
        os.environ["HF_TOKEN"] = os.environ[f"TOKEN_{name}"]
        try:
            print("SAID" + json.dumps(publish(sys.argv[1], changes=changes).commit))
        except Exception as error:
            print("SAID" + json.dumps(f"{type(error).__name__}: {error}"))
"""


@pytest.mark.chaos  # Prefect's own server is started
def test_a_token_is_refused_once_and_a_second_run_sends_nothing(hub: HubServer, tmp_path: Path):
    store = ArtifactStore(tmp_path / "store")
    adapter = store.ancestor(make_merged(store), TrainedAdapter)
    env = {**os.environ, **client_environment(hub, tmp_path / "hf"), "PREFECT_HOME": str(tmp_path / "prefect")}
    env |= {"TATARA_HOME": str(store.root), "TOKEN_READ": READ, "TOKEN_WRITE": WRITE}
    env |= {"PREFECT_LOGGING_EXTRA_LOGGERS": "tasks", "PREFECT_LOGGING_LEVEL": "DEBUG"}
    command = [sys.executable, "-c", _RUN, adapter.short]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    said = done.stdout + done.stderr
    answers = [json.loads(line.partition("SAID")[2]) for line in done.stdout.splitlines() if "SAID" in line]
    assert len(answers) == 3, said[-3000:]
    assert answers[0].startswith("RightsError") and "403, the token of ada is read-only" in answers[0]
    assert hub.count("GET", "/whoami-v2$") == 1 + 3  # refused: asked once, not tried again; check, upload, check
    assert answers[1] == answers[2] == hub.repos["model", "ada/tuned"].branches["main"]
    assert "adapter_model.safetensors" in hub.content("model", "ada/tuned")
    assert hub.count("POST", "/commit/") == 1 and hub.count("PUT", "/storage/") == 1
    assert len(store.committed(MergedModel)) == 1  # the one that was there: nothing was merged for it
    assert len(store.committed(PublishedModel)) == 1
    assert READ not in said and WRITE not in said
