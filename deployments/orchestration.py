"""Prefect on this machine: its server, work pools, deployments and one worker.

    server (127.0.0.1:4200) -> pools local, gpu -> prefect deploy --all -> worker on `local`

With PREFECT_API_URL set to a server elsewhere, that server is used and none is started. Otherwise
everything of Prefect's lives below TATARA_HOME/prefect; the user's own profile is left alone.

Ring: edge; the parent's side, it imports no Prefect (1.2 s) but calls its command line.
"""

import base64
import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tasks import files, processes, procfs
from tasks.environment import without_secrets
from tasks.errors import PortTakenError, ServiceError

ROOT = Path(__file__).resolve().parents[1]
POOLS = {"local": 4, "gpu": 1}  # name -> flow runs at once on one machine; drains run beside a training
_START_TIMEOUT_S = 120.0
_IDLE_TIMEOUT_S = 120.0  # a drain takes seconds, a training hours
_ANSWER_S = 60.0  # as Prefect's own client: the server itself waits so long for SQLite's lock
_LOOK_S = 15.0  # of one try, which only asks whether anybody is there
NUM_DEPLOYMENTS = 17
_BUSY = frozenset({408, 429, 502, 503})  # those that Prefect's own client sends again
_SHELL = re.compile(  # differs from terminal to terminal and decides nothing in a flow
    r"_|SHLVL|PWD|OLDPWD|TERM|TERM_.*|COLORTERM|COLUMNS|LINES|PS\d|LS_COLORS|WINDOWID|DISPLAY|WAYLAND_.*|XDG_.*|DBUS_.*"
    r"|SSH_.*|GPG_.*|TMUX.*|STY|VTE_.*|VSCODE_.*|MAKE.*|MFLAGS|INVOCATION_ID|JOURNAL_STREAM|PYTEST_.*|TATARA_PROCESS.*"
    r"|PYTHONDONTWRITEBYTECODE"  # the Makefile takes it away
)
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

    @property
    def client_variables(self) -> dict[str, str]:
        """The environment of Prefect's own server and commands: of the secrets only Prefect's."""
        return without_secrets(self.variables, keep=("PREFECT_", "PYTHONPATH"))

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
    given = variables.get("PREFECT_API_URL", "").rstrip("/")
    is_ours = not given or _was_ours(home, given)
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
    if is_ours:
        own["PREFECT_HOME"] = str(home)
    return Prefect(api_url=api_url, home=home, is_ours=is_ours, variables={**variables, **own})


def _was_ours(home: Path, url: str) -> bool:
    """Say whether a server of ours was started at `url`, and no other one is there now.

    `tatara up` tells people to export the address, so a shell may name our own server long after it was stopped.
    """
    address = home / "address.json"
    if not address.exists() or files.read_json(address) != url.replace("//localhost:", "//127.0.0.1:"):
        return False
    return processes.find_alive(home / "server.json") is not None or not is_taken(urlsplit(url).port or 80)


def call(
    prefect: Prefect, path: str, body: dict[str, Any] | None = None, method: str = "POST", *, tries: int = 6
) -> Any:  # Any: JSON
    """Send `body` to Prefect's API, or GET without one; None for 404. Raises URLError when it is away or refuses.

    A server that is busy says 503 (SQLite's lock, above all) and has then written nothing: asked again, as
    Prefect's own client does.
    """
    headers = {"Content-Type": "application/json"}
    if key := prefect.variables.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    elif login := prefect.variables.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(  # noqa: S310 - the user's server
        prefect.api_url + path, data=data, headers=headers, method="GET" if body is None else method
    )
    for number in range(tries):
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_S if tries > 1 else _LOOK_S) as reply:  # noqa: S310 - see above
                return json.loads(reply.read() or b"null")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            if error.code not in _BUSY or number == tries - 1:
                raise
        time.sleep(min(0.5 * 2**number, 4.0))
    raise ValueError(f"tries must be 1 or more, not {tries}")


def is_answering(prefect: Prefect) -> bool:
    """Say whether the API is healthy."""
    try:
        return call(prefect, "/health", tries=1) is not None
    except (OSError, ValueError):
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
    program = _plan(
        prefect,
        "server",
        ("server", "start", "--host", "127.0.0.1", "--port", str(port)),
        prefect.client_variables,
    )
    if running is None:
        files.write_json(prefect.home / "address.json", prefect.api_url)
        running = processes.start_detached(program)
    _wait_for(program, running, lambda: is_answering(prefect))


def _plan(prefect: Prefect, name: str, words: tuple[str, ...], variables: dict[str, str]) -> processes.Program:
    argv = tuple(prefect.command(*words))
    shown = sorted((name, value) for name, value in variables.items() if not _SHELL.fullmatch(name))
    digest = hashlib.sha256(repr([argv, shown]).encode()).hexdigest()  # of everything at once: nothing can be guessed
    return processes.Program(
        argv=argv,
        variables=variables,
        identity_file=prefect.identity(name),
        log=prefect.home / f"{name}.log",
        digest=digest,
    )


def _wait_for(program: processes.Program, running: processes.Identity, is_ready: Callable[[], bool]) -> None:
    """Return when it works. Raises ServiceError with its last lines when it died or takes too long."""
    name, deadline = program.identity_file.stem, time.monotonic() + _START_TIMEOUT_S
    while True:
        ready = is_ready()  # asked first: what answers may be another program
        if not running.is_alive() or time.monotonic() > deadline:
            what = "did not answer" if running.is_alive() else "died"
            raise ServiceError(
                f"Prefect's {name} {what} after it was started; the end of {program.log}:\n"
                f"{processes.last_lines(program.log)}"
            )
        if ready:
            return
        time.sleep(0.3)


def is_taken(port: int) -> bool:
    """Say whether something listens on a loopback port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def deploy(prefect: Prefect) -> bool:
    """Make what is missing of pools and deployments; False when all is as prefect.yaml and the flows say already.

    A pool that is there keeps its settings, whoever made it.
    """
    stamp, wanted = prefect.home / "deployed.json", _deployed_digest(prefect)
    try:
        missing = [name for name in POOLS if call(prefect, f"/work_pools/{name}") is None]
        count = call(prefect, "/deployments/count", {"deployments": {"tags": {"all_": ["tatara"]}}})
    except OSError as error:
        raise ServiceError(
            f"{prefect.api_url} can't be asked for its pools ({error}): "
            "is it reached, and PREFECT_API_KEY or PREFECT_API_AUTH_STRING right?"
        ) from error
    if not missing and stamp.exists() and files.read_json(stamp) == wanted and (count or 0) >= NUM_DEPLOYMENTS:
        return False
    for name in missing:
        _run(prefect, "work-pool", "create", name, "--type", "process")
        call(prefect, f"/work_pools/{name}", {"concurrency_limit": POOLS[name]}, "PATCH")
    _run(prefect, "deploy", "--all")
    files.write_json(stamp, wanted)
    return True


def list_schema_sources() -> list[Path]:
    """Return the files that decide what is deployed: the deployments, the flows, and what their forms are made of."""
    return [ROOT / "prefect.yaml", *sorted((ROOT / "flows").glob("*.py")), *sorted((ROOT / "tasks").rglob("spec*.py"))]


def _deployed_digest(prefect: Prefect) -> dict[str, str]:
    stamp = Path(sys.prefix) / "tatara.json"  # another Prefect or pydantic makes other forms
    sources = [*list_schema_sources(), *([stamp] if stamp.exists() else [])]
    parts = [word for path in sources for word in (str(path).encode(), path.read_bytes())]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
    return {"api": prefect.api_url, "sources": digest, "checkout": str(ROOT)}


def _run(prefect: Prefect, *words: str) -> None:
    argv = prefect.command(*words)
    done = subprocess.run(argv, env=prefect.client_variables, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-2000:]
        raise ServiceError(f"`prefect {' '.join(words)}` ended with {done.returncode}:\n{said}")


def start_worker(prefect: Prefect, pool: str = "local") -> str:
    """Start a process worker for `pool` unless ours runs already in this environment; return what was done.

    The worker's environment is the flows': one that was started without HF_TOKEN would publish locally
    for ever. So an idle worker is started anew when a variable changed. Raises ServiceError when the old
    one is at work, or when the new one dies.
    """
    name = f"tatara-{pool}"
    words = ("worker", "start", "--pool", pool, "--type", "process", "--name", name)
    program = _plan(prefect, "worker", words, prefect.variables)
    running = processes.find_alive(program.identity_file)
    if running and running.digest == program.digest:
        return "runs"
    changed = _changed(procfs.read_variables(running.pid), program.variables) if running else ""
    if running:
        _wait_until_idle(program, running, changed)
        processes.stop(program.identity_file, grace_s=15.0)
    before = _read_heartbeat(prefect, pool, name)
    started = processes.start_detached(program)
    _wait_for(program, started, lambda: _read_heartbeat(prefect, pool, name) != before)
    return f"started anew, for {changed} changed" if running else "started"


def _changed(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Name what differs, never its values."""
    names = sorted(
        name for name in old.keys() | new.keys() if old.get(name) != new.get(name) and not _SHELL.fullmatch(name)
    )
    return ", ".join(names[:6]) + (" ..." if names[6:] else "") or "its command"


def _wait_until_idle(program: processes.Program, running: processes.Identity, changed: str) -> None:
    """Return when the worker runs no flow: flow runs are its children."""
    begin, said = time.monotonic(), False
    while processes.find_members(program.identity_file, running).keys() - {running.pid}:
        if not said:
            logger.warning("%s changed: waiting until the worker's flow ends, then it is started anew", changed)
            said = True
        if time.monotonic() - begin > _IDLE_TIMEOUT_S:
            raise ServiceError(
                f"the worker (pid {running.pid}) runs a flow in the environment of its start, and since then {changed} "
                "changed: wait until the flow ends, or end both with `tatara down`"
            )
        time.sleep(0.5)


def _read_heartbeat(prefect: Prefect, pool: str, name: str) -> str:
    """Return when the worker was last heard of; empty when never."""
    try:
        workers = call(prefect, f"/work_pools/{pool}/workers/filter", {}) or []
    except OSError:
        return ""
    return next((str(worker["last_heartbeat_time"]) for worker in workers if worker["name"] == name), "")


def stop(prefect: Prefect) -> list[str]:
    """Stop our worker with its flow runs, then our server; return the names of what ran."""
    return [f"prefect {name}" for name in ("worker", "server") if processes.stop(prefect.identity(name), grace_s=15.0)]
