"""The gateway and a small upstream, each a real process on a free port of the loopback."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.ports import free_port

ROOT = Path(__file__).parents[3]
UPSTREAM = Path(__file__).parent / "upstream_server.py"


def clean_environment(**extra):
    names = ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return kept | {"PYTHONPATH": str(ROOT)} | {name: str(value) for name, value in extra.items()}


def wait_until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError(f"not so within {timeout_s} s: {condition}")


def _lower(headers):
    return {name.lower(): value for name, value in headers.items()}


class Server:
    """A process that answers HTTP."""

    def __init__(self, argv, port, environment, folder):
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self._argv, self._environment, self._folder = argv, environment, folder
        self.log = folder / f"server-{port}.log"
        self.process = None

    def start(self, probe="/health"):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._argv, env=self._environment, cwd=self._folder, stdout=log, stderr=log)
        wait_until(lambda: self._lives() and self.get(probe))
        return self

    def _lives(self):
        assert self.process.poll() is None, self.log.read_text()
        return True

    def stop(self, how=signal.SIGTERM):
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(20)

    def get(self, path):
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as reply:
                body = reply.read()
                return json.loads(body) if body else True
        except (urllib.error.URLError, ConnectionError):
            return None

    def post(self, path, body, headers=None):
        """Return (status, headers, raw body); errors are answers too."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json", **(headers or {})})
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.status, _lower(reply.headers), reply.read()
        except urllib.error.HTTPError as error:
            return error.code, _lower(error.headers), error.read()

    def chat(self, model="tiny", text="こんにちは", **more):
        status, headers, body = self.post("/v1/chat/completions", chat_body(model, text, **more))
        return status, headers, json.loads(body)


class Gateway(Server):
    def __init__(self, folder, upstream_port, **settings):
        port = free_port()
        self.queue = folder / "traces" / "llm_traces.jsonl"
        own = {
            "VLLM_URL": f"http://127.0.0.1:{upstream_port}/v1/chat/completions",
            "LITE_GATEWAY_PORT": port,
            "FILE_QUEUE_PATH": self.queue,
            "GATEWAY_PROBE_INTERVAL_S": 0.1,
        }
        environment = clean_environment(**(own | settings))
        super().__init__([sys.executable, "-m", "deployments.gateway"], port, environment, folder)

    def traces(self):
        if not self.queue.exists():
            return []
        return [json.loads(line) for line in self.queue.read_bytes().splitlines() if line]

    def trace(self, trace_id):
        """Wait for the one trace of a request; a second one would be a fault."""
        found = wait_until(lambda: [trace for trace in self.traces() if trace["trace_id"] == trace_id], 5)
        assert len(found) == 1
        return found[0]


def make_key(file, name, *options):
    """Make a key with the command; return the token."""
    argv = [sys.executable, "-m", "deployments.gateway.keys", "--file", str(file), "add", name, *map(str, options)]
    return subprocess.run(argv, env=clean_environment(), capture_output=True, text=True, check=True).stdout.strip()


def chat_body(model="tiny", text="こんにちは", **more):
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    port = free_port()
    argv = [sys.executable, str(UPSTREAM), str(port)]
    server = Server(argv, port, clean_environment(), tmp_path_factory.mktemp("upstream")).start()
    yield server
    server.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory, upstream):
    server = Gateway(tmp_path_factory.mktemp("gateway"), upstream.port, GATEWAY_MAX_BODY_BYTES=100_000).start()
    yield server
    server.stop()


@pytest.fixture
def start_gateway(tmp_path):
    """Start further gateways; all are stopped at the end."""
    started = []

    def start(upstream_port, **settings):
        server = Gateway(tmp_path, upstream_port, **settings)
        started.append(server)
        return server.start()

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def start_upstream(tmp_path):
    """Start a small upstream, on a given port or a free one; all are stopped at the end."""
    started = []

    def start(port=None):
        port = port or free_port()
        server = Server([sys.executable, str(UPSTREAM), str(port)], port, clean_environment(), tmp_path)
        started.append(server)
        return server.start()

    yield start
    for server in started:
        server.stop(signal.SIGKILL)


@pytest.fixture
def unused_port():
    return free_port()


@pytest.fixture(name="wait_until", scope="session")
def _wait_until():
    return wait_until


@pytest.fixture(name="chat_body")
def _chat_body():
    return chat_body


@pytest.fixture(name="clean_environment")
def _clean_environment():
    return clean_environment


@pytest.fixture(name="make_key", scope="session")
def _make_key():
    return make_key
