"""Uploads of a child process that is killed with SIGKILL, run again: only what is missing is sent."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from tasks import files
from tasks.artifacts import ArtifactStore, MergedModel, PublishedModel
from tests.hub_server import WRITE, HubServer, client_environment
from tests.tasks.publish.conftest import make_merged, write_model, write_shard

pytestmark = pytest.mark.slow
REPO = "ada/tuned"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
_PUBLISH = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
from tasks.artifacts import ArtifactStore, MergedModel
from tasks.publish.run import publish_model
from tasks.specs import PublishSpec
store = ArtifactStore(Path(sys.argv[1]))
merged = store.committed(MergedModel)[-1]
hub = HfApi(endpoint=sys.argv[2], token=sys.stdin.readline().strip())
print("COMMIT", publish_model(merged, PublishSpec(repo_id="ada/tuned"), store, hub).commit)
"""


_SHARD_BYTES = 1 << 20


def random_model(folder: Path) -> None:
    """Write weights that can't be compressed."""
    write_model(folder)
    for name in SHARDS:
        write_shard(folder / name, os.urandom(_SHARD_BYTES))


def start(store: ArtifactStore, hub: HubServer, tmp_path: Path, *, xet: bool) -> subprocess.Popen[str]:
    """Start a publication in a process of its own; the token goes through its standard input."""
    disable = {"HF_HUB_DISABLE_XET": "0" if xet else "1"}
    env = {**os.environ, **client_environment(hub, tmp_path / "hf-home"), **disable}
    child = subprocess.Popen(
        [sys.executable, "-c", _PUBLISH, str(store.root), hub.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,
    )
    assert child.stdin
    child.stdin.write(f"{WRITE}\n")
    child.stdin.flush()
    return child


def kill_when(child: subprocess.Popen[str], is_time: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not is_time():
        assert child.poll() is None, child.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "the upload never came so far"
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait(30)


def finish(child: subprocess.Popen[str]) -> str:
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 0 and WRITE not in said, said[-3000:]
    return said.rpartition("COMMIT ")[2].strip()


def held(hub: HubServer, revision: str = "main") -> dict[str, str]:
    repo = hub.repos["model", REPO]
    commit = repo.resolve(revision)
    assert commit
    return repo.commits[commit]


def digests(merged: MergedModel) -> dict[str, str]:
    folder = Path(merged.model_folder)
    return {name: files.digest(folder / name) for name in files.list_files(folder)}


def test_killed_between_two_shards(store: ArtifactStore, merged: MergedModel, hub: HubServer, tmp_path: Path):
    second = digests(merged)[SHARDS[1]]
    rule = hub.hold("PUT", f"/storage/{second}")
    first = digests(merged)[SHARDS[0]]
    kill_when(start(store, hub, tmp_path, xet=False), lambda: rule.hits > 0 and first in hub.blobs)
    rule.times = 0
    assert set(held(hub)) == {".gitattributes"} and store.committed(PublishedModel) == []  # nothing half is visible
    hub.requests.clear()
    commit = finish(start(store, hub, tmp_path, xet=False))
    assert [path for method, path in hub.requests if method == "PUT"] == [f"/storage/{second}"]
    assert held(hub, commit).items() >= digests(merged).items() and hub.count("POST", "/commit/") == 1


@pytest.mark.parametrize("xet", [True, False])
def test_killed_while_the_commit_is_made(
    store: ArtifactStore, merged: MergedModel, hub: HubServer, tmp_path: Path, xet: bool
):
    """The Hub has committed, the client never heard of it: the next run finds the commit and sends nothing."""
    rule = hub.hold("GET", "/tree/[0-9a-f]{40}")
    rule.skip = 1  # the look before the upload; the second is the checksums
    kill_when(start(store, hub, tmp_path, xet=xet), lambda: rule.hits > 0)
    rule.times = 0
    assert store.committed(PublishedModel) == []
    head = hub.repos["model", REPO].branches["main"]
    hub.requests.clear()
    assert finish(start(store, hub, tmp_path, xet=xet)) == head
    assert hub.writes() == ["POST /api/repos/create"] and hub.count("GET", "/xet-write-token/") == 0


def test_killed_before_the_commit_with_xet(store: ArtifactStore, hub: HubServer, tmp_path: Path):
    """All weights are in the CAS, nothing is committed: the next run adds no data there."""
    merged = make_merged(store, random_model)
    rule = hub.hold("POST", "/commit/")
    kill_when(start(store, hub, tmp_path, xet=True), lambda: rule.hits > 0)
    rule.times = 0
    xorbs = hub.folder / "cas/xet/xorbs/xorbs"
    stored = files.list_files(xorbs)
    assert sum(stored.values()) >= 2 * _SHARD_BYTES and set(held(hub)) == {".gitattributes"}
    commit = finish(start(store, hub, tmp_path, xet=True))
    assert held(hub, commit).items() >= digests(merged).items()
    assert files.list_files(xorbs) == stored


@pytest.mark.chaos
@pytest.mark.parametrize("xet", [True, False])
def test_killed_at_any_moment(store: ArtifactStore, hub: HubServer, tmp_path: Path, xet: bool):
    """Kills after 1, 2, 3, ... requests until one run gets through: one commit, every byte, no artifact before."""

    merged = make_merged(store, random_model)
    for num_requests in range(2, 60, 3):
        seen = len(hub.requests)
        child = start(store, hub, tmp_path, xet=xet)
        try:
            kill_when(child, lambda seen=seen, n=num_requests: len(hub.requests) - seen >= n)
        except AssertionError:
            if child.returncode == 0:
                break
            raise
        if hub.count("POST", "/commit/"):
            break
        for index in (hub.folder / "cas").rglob("*.redb"):  # the local CAS runs in the client: its index dies with it
            index.unlink()
        assert ("model", REPO) not in hub.repos or set(held(hub)) == {".gitattributes"}
    finish(start(store, hub, tmp_path, xet=xet))
    assert held(hub).items() >= digests(merged).items()
    assert len(hub.repos["model", REPO].commits) == 2
    published = store.committed(PublishedModel)[-1]
    assert json.loads((published.path / "manifest.json").read_text())["artifact"]["commit"] == published.commit
    assert HfApi(endpoint=hub.url, token=WRITE).model_info(REPO).sha == published.commit
