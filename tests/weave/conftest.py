"""The real trace server, started once; a project of its own for each test; the tools to ask it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.ports import free_port
from tests.records import make_record

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-weave" / "bin" / "python"
KEY = "0123456789abcdef0123456789abcdef01234567"


def pytest_collection_modifyitems(config, items):
    """Leave these tests out where the environment is not; `make weave-test` makes it first."""
    if (PYTHON.parents[1] / "tatara.json").exists():
        return
    here = [item for item in items if item.get_closest_marker("weave")]
    if here:
        config.hook.pytest_deselected(items=here)
        items[:] = [item for item in items if item not in here]


class TraceServer:
    """The process, and one project in it."""

    def __init__(self, url, project="start"):
        self.url, self.project, self.project_id = url, project, f"team/{project}"
        self.client = httpx.Client(base_url=url, auth=("api", KEY), timeout=60)

    def ask(self, path, **body):
        reply = self.client.post(path, json={"project_id": self.project_id, **body})
        assert reply.status_code == 200, reply.text
        return reply

    def calls(self, **query):
        """Return the calls as a reader of the project sees them: {id: [call, ...]}."""
        found = {}
        for call in map(json.loads, self.ask("/calls/stream_query", **query).text.split("\n")[:-1]):
            found.setdefault(call["id"], []).append(call)
        return found

    def count(self):
        return self.ask("/calls/query_stats").json()["count"]

    def rows(self):
        """Count the physical rows of each call id, copies included."""
        return self.client.get("/rows", params={"project": self.project}).json()

    def plan(self, **plan):
        return self.client.post("/control", json=plan).raise_for_status().json()

    def told(self):
        return self.client.get("/control").json()

    def environment(self, **more):
        """What a drain needs to find this project."""
        names = ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")
        account = {"WANDB_API_KEY": KEY, "WANDB_ENTITY": "team", "WANDB_PROJECT": self.project}
        kept = {name: os.environ[name] for name in names if name in os.environ}
        return kept | account | {"WF_TRACE_SERVER_URL": self.url, "PYTHONPATH": str(ROOT)} | more


def wait_until_it_answers(url, process, log, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(url, timeout=5)
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer after {timeout_s} s: {log.read_text()}")


@pytest.fixture(scope="session")
def start_process(tmp_path_factory):
    """Start servers; each is given its URL's probe to answer; all are killed at the end."""
    started = []

    def start(argv, probe, environment):
        log = tmp_path_factory.mktemp("log") / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(argv, env=environment, stdout=output, stderr=output)
        started.append(process)
        wait_until_it_answers(probe, process, log)
        return process

    yield start
    for process in started:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="session")
def trace_server_url(start_process, tmp_path_factory):
    assert PYTHON.exists(), "no .venv-weave: run `make weave-test`, which makes it"
    url = f"http://127.0.0.1:{free_port()}"
    script = Path(__file__).parent / "trace_server.py"
    argv = [str(PYTHON), str(script), url.rpartition(":")[2], str(tmp_path_factory.mktemp("chdb"))]
    start_process(argv, f"{url}/health", dict(os.environ))
    return url


@pytest.fixture
def weave(trace_server_url, request):
    """A trace server that behaves, and an empty project."""
    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]
    server = TraceServer(trace_server_url, f"p{name}")
    server.plan()
    yield server
    server.plan()
    server.client.close()


@pytest.fixture(name="make_record")
def _make_record():
    return make_record


@pytest.fixture
def free():
    """A function that finds a port that nobody listened on a moment ago."""
    return free_port


@pytest.fixture
def python():
    return sys.executable
