"""A real Ray cluster of two nodes on this machine, started as the flow starts one, once for all tests here."""

import os
import select
import socket
import threading
from pathlib import Path

import pytest

from tasks.ppo.cluster import open_cluster
from tasks.specs import PpoSpec, RaySpec
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-ppo" / "bin" / "python"
TWO_NODES = RaySpec(
    address="local",
    local_nodes=2,
    local_cpus=8,
    local_gpus=1,
    local_object_store_bytes=100_000_000,
    poll_s=0.3,
    health_s=1,
)


def pytest_collection_modifyitems(config, items):
    """Leave these tests out where the environment is not; `make ray-test` makes it first."""
    if (PYTHON.parents[1] / "tatara.json").exists():
        return
    here = [item for item in items if item.get_closest_marker("ray")]
    if here:
        config.hook.pytest_deselected(items=here)
        items[:] = [item for item in items if item not in here]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A cluster that answers; it is stopped after the last test."""
    assert PYTHON.exists(), "no .venv-ppo: run `make ray-test`, which makes it"
    variables = {**os.environ, "RAY_memory_monitor_refresh_ms": "0"}  # it kills for what others on this machine take
    with open_cluster(TWO_NODES, PpoSpec(), tmp_path_factory.mktemp("cluster"), variables) as opened:
        yield opened


class Proxy:
    """A TCP proxy in front of a dashboard, which can be cut: connections end and none is taken until it is mended."""

    def __init__(self, target_port):
        self.port, self._target, self._open, self._cut = free_port(), target_port, [], threading.Event()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def cut(self):
        self._cut.set()
        for one in self._open:
            one.close()

    def mend(self):
        self._cut.clear()

    def close(self):
        self.cut()
        self._listener.close()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._cut.is_set():
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._target))
            self._open += [client, server]
            threading.Thread(target=self._pump, args=(client, server), daemon=True).start()

    def _pump(self, client, server):
        try:
            while True:
                for one in select.select([client, server], [], [])[0]:
                    data = one.recv(65536)
                    if not data:
                        return
                    (server if one is client else client).sendall(data)
        except (OSError, ValueError):
            return
        finally:
            client.close()
            server.close()


@pytest.fixture
def proxy(cluster):
    made = Proxy(int(cluster.jobs.url.rpartition(":")[2]))
    yield made
    made.close()
