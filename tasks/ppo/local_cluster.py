"""Run a Ray cluster on this machine: a head and maybe more raylets, all on loopback, until told to end.

    python -m tasks.ppo.local_cluster cluster.json

One process stands for all of them: its identity file finds it, and stopping it stops what it started. A second raylet
on one machine is for tests; on one machine with GPUs one is enough.

Ring: edge.  Units: seconds, bytes.
"""

import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

_GRACE_S = 10.0
logger = logging.getLogger("ray")


def head_command(config: dict[str, Any]) -> list[str]:  # Any: JSON values
    """Return the command of the head."""
    ports = config["ports"]
    return [
        *(config["ray"], "start", "--block", "--head", "--disable-usage-stats", "--node-ip-address=127.0.0.1"),
        f"--port={ports['gcs']}",
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports['dashboard']}"),
        f"--ray-client-server-port={ports['client']}",
        f"--temp-dir={config['temp_folder']}",
        *_node_options(config, ports["agents"][0]),
    ]


def worker_command(config: dict[str, Any], number: int) -> list[str]:  # Any: JSON values
    """Return the command of raylet `number`, which joins the head."""
    return [
        *(config["ray"], "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"),
        f"--address=127.0.0.1:{config['ports']['gcs']}",
        *_node_options(config, config["ports"]["agents"][number]),
    ]


def _node_options(config: dict[str, Any], agent_port: int) -> list[str]:  # Any: JSON values
    return [
        f"--num-cpus={config['cpus']}",
        *([f"--num-gpus={config['gpus']}"] if config["gpus"] >= 0 else []),
        f"--object-store-memory={config['object_store_bytes']}",
        f"--dashboard-agent-listen-port={agent_port}",
        *("--min-worker-port=0", "--max-worker-port=0"),  # the kernel's choice: two raylets would share Ray's range
    ]


def main(config_path: str) -> int:
    """Start all nodes and wait; a head that dies ends the rest, a lost worker is said and left lost."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = json.loads(Path(config_path).read_text())
    children = {"head": subprocess.Popen(head_command(config))}

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)
    try:
        for number in range(1, config["num_nodes"]):
            time.sleep(config["between_s"])  # the head's port has to be there
            children[f"node {number}"] = subprocess.Popen(worker_command(config, number))
        said: set[str] = set()
        while children["head"].poll() is None:
            for name, child in children.items():
                if child.poll() is not None and name not in said:
                    said.add(name)
                    logger.warning("%s ended with %d", name, child.returncode)
            time.sleep(0.5)
        return 1
    finally:
        _end(list(children.values()))


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    for child in reversed(children):
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + _GRACE_S
    for child in children:
        try:
            child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
