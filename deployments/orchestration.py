"""Prefect on this machine: its server, work pools, deployments and one worker.

    server (127.0.0.1:4200) -> pools local, gpu -> prefect deploy --all -> worker on `local`

With PREFECT_API_URL set, that server is used and none is started. Otherwise everything of
Prefect's lives below TATARA_HOME/prefect; the user's own profile is left alone.

Ring: edge; the parent's side, it imports no Prefect (1.2 s) but calls its command line.
"""

import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tasks import files, processes
from tasks.errors import PortTakenError, ServiceError

ROOT = Path(__file__).resolve().parents[1]
POOLS = {"local": 4, "gpu": 1}  # name -> flow runs at once on one machine; drains run beside a training
_START_TIMEOUT_S = 120.0
NUM_DEPLOYMENTS = 6  # of prefect.yaml, all tagged tatara
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefect:
    """Where Prefect is and how it is called. `variables` may hold secrets: not in the repr."""

    api_url: str
    home: Path
    is_ours: bool
    variables: dict[str, str] = field(repr=False)

    @property
    def ui_url(self) -> str:
        """Address for a browser."""
        return self.api_url.removesuffix("/api")

    def command(self, *words: str) -> list[str]:
        """Return the argv of a Prefect command of this environment."""
        return [sys.executable, "-m", "prefect", "--no-prompt", *words]

    def identity(self, name: str) -> Path:
        """Return the file that names the running server or worker."""
        return self.home / f"{name}.json"


def find_prefect(variables: Mapping[str, str]) -> Prefect:
    """Return the Prefect that the environment names, else one of our own below TATARA_HOME."""
    home = Path(variables.get("TATARA_HOME") or ".tatara").expanduser().resolve() / "prefect"
    port = variables.get("PREFECT_SERVER_API_PORT") or "4200"
    given = variables.get("PREFECT_API_URL", "")
    api_url = given or f"http://127.0.0.1:{port}/api"
    own = {
        "PREFECT_API_URL": api_url,
        "PREFECT_LOGGING_EXTRA_LOGGERS": "tasks",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "TATARA_CHECKOUT": str(ROOT),
        "TATARA_HOME": str(home.parent),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH", "")])),
    }
    if not given:
        own["PREFECT_HOME"] = str(home)
    return Prefect(api_url=api_url, home=home, is_ours=not given, variables={**variables, **own})


def is_answering(prefect: Prefect) -> bool:
    """Say whether the API is healthy."""
    try:
        with urllib.request.urlopen(f"{prefect.api_url}/health", timeout=5) as reply:  # noqa: S310 - the user's server
            return reply.status == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def start_server(prefect: Prefect) -> None:
    """Start our server unless it answers already.

    Raises: PortTakenError (another program has the port), ServiceError (it died, or a given one is away).
    """
    running = processes.find_alive(prefect.identity("server"))
    if is_answering(prefect) and (running or not prefect.is_ours):
        return
    if not prefect.is_ours:
        raise ServiceError(f"PREFECT_API_URL {prefect.api_url} does not answer: start that server, or unset it")
    port = urlsplit(prefect.api_url).port or 4200
    if running is None and is_taken(port):
        raise PortTakenError(
            f"port {port} belongs to another program, so Prefect's server can't start: stop it, set "
            "PREFECT_SERVER_API_PORT to a free port, or PREFECT_API_URL to a server that runs"
        )
    log = prefect.home / "server.log"
    if running is None:
        argv = prefect.command("server", "start", "--host", "127.0.0.1", "--port", str(port))
        running = processes.start_detached(argv, prefect.variables, log, prefect.identity("server"))
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not is_answering(prefect):
        if not running.is_alive() or time.monotonic() > deadline:
            raise ServiceError(f"Prefect's server did not start; its last lines:\n{processes.last_lines(log)}")
        time.sleep(0.3)


def is_taken(port: int) -> bool:
    """Say whether something listens on a loopback port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def deploy(prefect: Prefect) -> bool:
    """Make pools and deployments; False when they are as prefect.yaml and the flows say already."""
    stamp, wanted = prefect.home / "deployed.json", _deployed_digest(prefect)
    if stamp.exists() and files.read_json(stamp) == wanted and _count_deployments(prefect) >= NUM_DEPLOYMENTS:
        return False
    for name, limit in POOLS.items():
        if prefect.is_ours:  # pools of a server that others use too are left as they are
            _run(prefect, "work-pool", "create", name, "--type", "process", "--overwrite")
            _run(prefect, "work-pool", "set-concurrency-limit", name, str(limit))
    _run(prefect, "deploy", "--all")
    files.write_json(stamp, wanted)
    return True


def _count_deployments(prefect: Prefect) -> int:
    request = urllib.request.Request(  # noqa: S310 - the user's server
        f"{prefect.api_url}/deployments/count",
        data=json.dumps({"deployments": {"tags": {"all_": ["tatara"]}}}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=15) as reply:  # noqa: S310 - see above
        return int(reply.read())


def _deployed_digest(prefect: Prefect) -> dict[str, str]:
    sources = [ROOT / "prefect.yaml", ROOT / "tasks/specs.py", *sorted((ROOT / "flows").glob("*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return {"api": prefect.api_url, "sources": digest, "checkout": str(ROOT)}


def _run(prefect: Prefect, *words: str) -> None:
    argv = prefect.command(*words)
    done = subprocess.run(argv, env=prefect.variables, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-2000:]
        raise ServiceError(f"`prefect {' '.join(words)}` ended with {done.returncode}:\n{said}")


def start_worker(prefect: Prefect, pool: str = "local") -> None:
    """Start a process worker for `pool` unless ours runs already."""
    if processes.find_alive(prefect.identity("worker")):
        return
    argv = prefect.command("worker", "start", "--pool", pool, "--type", "process", "--name", f"tatara-{pool}")
    processes.start_detached(argv, prefect.variables, prefect.home / "worker.log", prefect.identity("worker"))


def stop(prefect: Prefect) -> list[str]:
    """Stop our worker, then our server; return the names of what ran."""
    stopped: list[str] = []
    for name in ("worker", "server"):
        running = processes.find_alive(prefect.identity(name))
        if running:
            processes.stop_group(running, grace_s=15.0)
            stopped.append(f"prefect {name}")
    return stopped
