"""How the services are: looks, starts and stops nothing.

    status() -> ServicesStatus      vLLM that serves, a candidate beside it, the gateway

Ring: edge (processes, loopback).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tasks import files, processes
from tasks.errors import CorruptError
from tasks.procfs import read_start_ticks
from tasks.serve.asking import get_json
from tasks.serve.command import reach
from tasks.serve.settings import SLOTS, ServiceSettings
from tasks.serve.traffic import active_slot, gateway_says


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStatus:
    """How one service is: "stopped", "starting" (it runs but does not answer), "ready", "waiting" or "gave up"."""

    name: str
    state: str
    pid: int
    url: str
    log: Path
    model: str = ""
    restarts: int = 0
    why: str = ""  # it waits for its next start, or is not started again


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicesStatus:
    """How both services are; `reused` says that start() found the right vLLM running."""

    vllm: ServiceStatus
    gateway: ServiceStatus
    reused: bool = False
    candidate: ServiceStatus | None = None  # beside the one that serves: a promotion's, or what a killed one left

    @property
    def is_ready(self) -> bool:
        """Say whether both answer."""
        return self.vllm.state in {"ready", "elsewhere"} and self.gateway.state == "ready"


def status(settings: ServiceSettings, *, reused: bool = False) -> ServicesStatus:
    """Look at both services; starts and stops nothing. Cost: three requests to loopback."""
    settings = follow(settings)
    host, spec = reach(settings.spec.host), settings.spec
    vllm = _look_at_vllm(settings, settings.vllm_port)
    candidate = _look_at_candidate(settings)
    if not settings.uses_own_vllm:
        vllm = ServiceStatus(name="vllm", state="elsewhere", pid=0, url=settings.vllm_url, log=vllm.log)
    gateway_url = f"http://{host}:{spec.gateway_port}"
    gateway = _look(settings, "gateway", gateway_url, lambda: is_gateway_ready(gateway_url))
    if settings.uses_own_vllm and gateway.pid:
        gateway = replace(gateway, model=", ".join(_followed(settings)))
    return ServicesStatus(vllm=vllm, gateway=gateway, reused=reused, candidate=candidate)


def _followed(settings: ServiceSettings) -> list[str]:
    """Return the models that get requests now: the gateway was started with one, and has followed the file since."""
    servers = gateway_says(settings).get("upstreams", [])
    names = [str(server.get("name")) for server in servers if server.get("weight")] or [settings.slot]
    notes = (processes.read_identity(settings.identity_file(name)) for name in names if name in SLOTS)
    return [note.note["model"] for note in notes if note and note.note.get("model")]


def _look_at_vllm(settings: ServiceSettings, port: int) -> ServiceStatus:
    url = f"http://{reach(settings.spec.host)}:{port}"
    found = _look(settings, settings.slot, url, lambda: get_json(f"{url}/health")[0] == 200)
    return replace(found, name="vllm")


def _look_at_candidate(settings: ServiceSettings) -> ServiceStatus | None:
    beside = replace(settings, slot=settings.other_slot)
    running = processes.find_alive(beside.identity_file(beside.slot))
    if running is None:
        return None
    found = replace(_look_at_vllm(beside, beside.vllm_port), name="candidate")
    return found if is_alive(running.note.get("promoter", "")) else replace(found, state="abandoned")


def follow(settings: ServiceSettings) -> ServiceSettings:
    """Return the settings for the slot that serves now."""
    return replace(settings, slot=active_slot(settings.folder))


def this_process() -> str:
    """Return what tells this process from every other that this boot of the machine has seen."""
    return f"{os.getpid()}@{read_start_ticks(os.getpid())}"


def is_alive(process: str) -> bool:
    """Say whether a process that `this_process` named still runs."""
    pid, _, ticks = process.partition("@")
    return pid.isdigit() and str(read_start_ticks(int(pid))) == ticks


def _look(settings: ServiceSettings, name: str, url: str, is_ready: Callable[[], bool]) -> ServiceStatus:
    running = processes.find_alive(settings.identity_file(name))
    log = settings.log(name)
    said = read_state(settings, name)
    state = str(said.get("state", ""))
    if running is None:
        state = state if state == "gave up" else "stopped"
    elif is_ready():
        state = "ready"
    elif state != "waiting":
        state = "starting"
    return ServiceStatus(
        name=name,
        state=state,
        pid=running.pid if running else 0,
        url=url,
        log=log,
        model=running.note.get("model", "") if running else "",
        restarts=int(said.get("restarts", 0)),
        why=str(said.get("why", "")) if state in {"gave up", "waiting"} else "",
    )


def read_state(settings: ServiceSettings, name: str) -> dict[str, Any]:  # Any: JSON values
    """Return what the service's supervisor says of it: state, restarts, why; empty without one."""
    try:
        said = files.read_json(settings.state_file(name))
    except (OSError, CorruptError):
        return {}
    return {key: said[key] for key in ("state", "restarts", "why") if key in said} if isinstance(said, dict) else {}


def is_gateway_ready(url: str) -> bool:
    """Say whether the gateway answers and reaches vLLM."""
    code, body = get_json(f"{url}/health")
    return code == 200 and body.get("gateway") == "ok" and body.get("vllm") is True
