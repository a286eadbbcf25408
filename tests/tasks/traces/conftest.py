"""Records, a Weave-like server that stores and misbehaves, and a real redis-server."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.needs import redis_server
from tests.ports import free_port
from tests.records import make_record

ROOT = Path(__file__).parents[3]
WEAVE = Path(__file__).parent / "weave_server.py"


@pytest.fixture(name="make_record")
def _make_record():
    return make_record


@pytest.fixture
def redis_port(tmp_path):
    """Start redis-server on a free port; without one: skip here, fail on CI."""
    port = free_port()
    argv = [redis_server(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    _wait_for_port(port, process)
    yield port
    process.kill()
    process.wait()


def _wait_for_port(port, process):
    for _ in range(500):
        assert process.poll() is None
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError(f"nothing listens on {port}")


class Weave:
    """The Weave-like server: what it holds, and how to make it misbehave."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=10) as reply:
            return json.loads(reply.read())

    def misbehave(self, **how):
        request = urllib.request.Request(self.url + "/misbehave", json.dumps(how).encode())
        urllib.request.urlopen(request, timeout=10).close()

    def rows(self):
        return self.get("/rows")


@pytest.fixture
def weave():
    port = free_port()
    process = subprocess.Popen([sys.executable, str(WEAVE), str(port)])
    _wait_for_port(port, process)
    yield Weave(port)
    process.kill()
    process.wait()


@pytest.fixture
def free():
    return free_port


@pytest.fixture
def root():
    return ROOT
