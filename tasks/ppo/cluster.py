"""Open the Ray cluster of a run: join the one that is named, or start one here for as long as the run lasts.

    RaySpec + environment -> open_cluster() -> Cluster -> require_fit()

Ring: edge.  Units: seconds, bytes.
"""

import asyncio
import json
import logging
import secrets
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

from tasks import files
from tasks.environment import without_secrets
from tasks.errors import CapacityError, MissingError, ServiceError, TransientError
from tasks.ppo.demand import NodeFacts, check_nodes, check_resources, read_facts
from tasks.ppo.probe_text import MARK, read_probe
from tasks.processes import Program, digest_argv, find_alive, last_lines, start_detached, stop
from tasks.ray_cluster import find_dashboard
from tasks.ray_follow import Patience, follow
from tasks.ray_follow import last_lines as last_words
from tasks.ray_jobs import Job, RayJobs
from tasks.specs import PpoSpec, RaySpec

ROOT = Path(__file__).resolve().parents[2]
CONFIG, TOKEN = "cluster.json", "cluster.token"
LOCAL = "local"
_PROBE_S = 180.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A cluster that answers. `python` runs verl on its nodes; `is_ours`: started here, and stopped with the run."""

    jobs: RayJobs
    python: str
    is_ours: bool
    token: str = field(default="", repr=False)  # of a cluster of ours


@contextmanager
def open_cluster(spec: RaySpec, ppo: PpoSpec, folder: Path, variables: Mapping[str, str]) -> Iterator[Cluster]:
    """Yield the cluster. One that was started here is stopped at the end, unless its job is to be followed later.

    Args:
        spec: which cluster.
        ppo: for W&B, whose key a cluster of ours gets in its own environment.
        folder: where a cluster of ours is written down; the artifact's.
        variables: the environment; RAY_ADDRESS and RAY_AUTH_TOKEN count.
    Raises: MissingError (no cluster is named, no .venv-ppo), ServiceError, UnavailableError.
    """
    address = find_address(spec, variables)
    python = spec.python or str(find_python(variables))
    is_ours = address == LOCAL
    with ExitStack() as stack:
        url, token = address, ""
        if is_ours:
            url, token = stack.enter_context(_run_locally(spec, ppo, folder, python, variables))
        jobs = RayJobs(url, {"RAY_AUTH_TOKEN": token}) if is_ours else RayJobs(address, variables)
        stack.callback(jobs.close)
        yield Cluster(jobs=jobs, python=python, is_ours=is_ours, token=token)


def find_address(spec: RaySpec, variables: Mapping[str, str]) -> str:
    """Return the dashboard's URL, or 'local'. Raises MissingError when no cluster is named, or not by that URL."""
    if LOCAL in (spec.address, not spec.address and variables.get("RAY_ADDRESS")):
        return LOCAL
    otherwise = ", or RaySpec.address to 'local' for one that is started here"
    return find_dashboard(spec.address, variables, "RaySpec.address", otherwise)


def find_python(variables: Mapping[str, str]) -> Path:
    """Return the Python of verl's environment. Raises MissingError when there is none."""
    path = Path(variables.get("TATARA_PPO_PYTHON") or ROOT / ".venv-ppo" / "bin" / "python")
    if not path.exists():
        raise MissingError(
            f"verl's environment is not there ({path}): make it with `python3 deployments/environments.py ppo`, point "
            "TATARA_PPO_PYTHON at another, or name the nodes' own in RaySpec.python"
        )
    return path


def require_fit(cluster: Cluster, spec: RaySpec, ppo: PpoSpec, paths: list[str]) -> dict[str, str]:
    """Return the versions on a cluster that can run this, and log what was found.

    Raises: CapacityError or SpecError, which say all that is missing.
    """
    wait_s = spec.start_timeout_s if cluster.is_ours else spec.wait_for_nodes_s
    logger.info("%s", require_nodes(cluster.jobs, spec, ppo, wait_s))
    names = ["WANDB_API_KEY"] if ppo.report_to == "wandb" and ppo.environment.get("WANDB_MODE") != "offline" else []
    nodes = ask_nodes(cluster, paths, names)
    logger.info("%s", check_nodes(nodes, cluster.jobs.url))
    return {"python": nodes[0].python, "ray": nodes[0].ray, "verl": nodes[0].verl}


def require_nodes(jobs: RayJobs, spec: RaySpec, ppo: PpoSpec, wait_s: float) -> str:
    """Return a line on nodes that are enough; those that are still to come are waited for. Raises CapacityError."""
    deadline = time.monotonic() + wait_s
    while True:
        nodes = jobs.nodes()
        try:
            return check_resources([node.resources for node in nodes], ppo, jobs.url)
        except CapacityError:
            all_came = spec.address == LOCAL and len(nodes) >= spec.local_nodes
            if all_came or time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def ask_nodes(cluster: Cluster, paths: list[str], names: list[str]) -> list[NodeFacts]:
    """Ask every node for its versions, and whether it sees these paths and has these variables."""
    words = [cluster.python, "-c", read_probe(), json.dumps(paths), json.dumps(names)]
    job = Job(submission_id=f"tatara-probe-{uuid4().hex[:12]}", entrypoint=shlex.join(words))
    cluster.jobs.ensure(job)
    lines: list[str] = []
    state = follow(
        cluster.jobs, job.submission_id, Patience(poll_s=0.5, lost_after_s=_PROBE_S), lines.append, lambda nodes: None
    )
    told = next((line.removeprefix(MARK) for line in lines if line.startswith(MARK)), "")
    if not told:
        raise ServiceError(
            f"the nodes of {cluster.jobs.url} could not be asked with {cluster.python}: {state.status}, "
            f"{state.message}\n{last_words(chr(10).join(lines))}"
        )
    cluster.jobs.delete(job.submission_id)
    return read_facts(json.loads(told))


@contextmanager
def _run_locally(
    spec: RaySpec, ppo: PpoSpec, folder: Path, python: str, variables: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Yield URL and token of a cluster on this machine: the one that an earlier run left, else a new one."""
    identity_file = folder / "process.json"
    try:
        if find_alive(identity_file):
            logger.info("found the Ray cluster that an earlier try left running")
        else:
            stop_locally(folder)  # raylets that outlived a killed supervisor
            _start(spec, ppo, folder, python, variables)
        url, token = _read_local(folder)
        _wait_until_it_answers(url, token, spec, folder)
        yield url, token
    except asyncio.CancelledError:
        raise  # no person's wish: the job goes on there, and the next run of this follows it
    except BaseException:
        stop_locally(folder)
        raise
    stop_locally(folder)


def local_jobs(folder: Path) -> RayJobs | None:
    """Return a client of the cluster that an earlier run of this artifact left running here, None without one."""
    if find_alive(folder / "process.json") is None:
        return None
    url, token = _read_local(folder)
    return RayJobs(url, {"RAY_AUTH_TOKEN": token})


def stop_locally(folder: Path) -> None:
    """Stop the cluster that was started here for an artifact, with all that it left on the disk."""
    stop(folder / "process.json")
    (folder / TOKEN).unlink(missing_ok=True)
    shutil.rmtree(_temp_folder(folder), ignore_errors=True)


def _read_local(folder: Path) -> tuple[str, str]:
    return f"http://127.0.0.1:{files.read_json(folder / CONFIG)['ports']['dashboard']}", (folder / TOKEN).read_text()


def _temp_folder(folder: Path) -> Path:
    """Return where Ray keeps sockets and logs; sockets lie below it, and 107 bytes are the longest path of one."""
    return Path(tempfile.gettempdir()) / f"tatara-ray-{sha256(str(folder).encode()).hexdigest()[:12]}"


def _start(spec: RaySpec, ppo: PpoSpec, folder: Path, python: str, variables: Mapping[str, str]) -> None:
    ports = _free_ports(3 + spec.local_nodes)
    config = {
        "ray": str(Path(python).with_name("ray")),
        "num_nodes": spec.local_nodes,
        "cpus": spec.local_cpus,
        "gpus": spec.local_gpus,
        "object_store_bytes": spec.local_object_store_bytes,
        "temp_folder": str(_temp_folder(folder)),
        "ports": {"gcs": ports[0], "dashboard": ports[1], "client": ports[2], "agents": ports[3:]},
        "between_s": 3.0,
    }
    files.write_json(folder / CONFIG, config)
    token = secrets.token_hex(32)  # Ray's ports can be reached from outside: without one anybody could run code here
    (folder / TOKEN).touch(mode=0o600)
    (folder / TOKEN).write_text(token)
    argv = (sys.executable, "-m", "tasks.ppo.local_cluster", str(folder / CONFIG))
    keep = ("WANDB_API_KEY",) if ppo.report_to == "wandb" else ()
    ours = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    start_detached(
        Program(
            argv=argv,
            variables={**without_secrets(variables, keep=keep), **ours},
            identity_file=folder / "process.json",
            log=folder / "output.log",
            digest=digest_argv(argv),
        )
    )


def _wait_until_it_answers(url: str, token: str, spec: RaySpec, folder: Path) -> None:
    jobs, deadline = RayJobs(url, {"RAY_AUTH_TOKEN": token}), time.monotonic() + spec.start_timeout_s
    try:
        while True:
            try:
                if len(jobs.nodes()) >= spec.local_nodes:
                    return
            except (TransientError, MissingError, ServiceError):
                pass  # still starting
            if find_alive(folder / "process.json") is None or time.monotonic() > deadline:
                raise ServiceError(
                    f"the local Ray cluster did not come up within {spec.start_timeout_s:g} s; its last lines:\n"
                    f"{last_lines(folder / 'output.log')}"
                )
            time.sleep(0.5)
    finally:
        jobs.close()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
