"""Start vLLM, wait until it answers, then the gateway; stop, restart and tell how they are.

    ServiceSettings -> start() -> ServicesStatus      (the same question twice: the second is free)

What runs already with the same command, model files, code, packages and settings is kept; anything else of ours
on these ports is replaced; anything foreign is named and left alone.

Ring: edge.  Units: seconds, bytes.
Trap: the model folder's path says nothing about its weights. A re-merged model under the same
      path must not be answered by the old server, so sizes and times of its files are part of
      the digest.
"""

import http.client
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tasks import files, processes
from tasks.environment import without_secrets
from tasks.errors import ServiceError
from tasks.serve.command import chat_url, gateway_command, reach, vllm_command
from tasks.serve.fingerprints import fingerprint_environment, fingerprint_gateway, fingerprint_model
from tasks.serve.preflight import check_memory, check_model, check_ports, has_cpu_build
from tasks.serve.settings import ROOT, SERVICES, ServiceSettings, digest_of

__all__ = ["ServiceSettings", "ServiceStatus", "ServicesStatus", "restart", "start", "status", "stop"]

_POLL_S = 0.25

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStatus:
    """How one service is: "stopped", "starting" (it runs but does not answer) or "ready"."""

    name: str
    state: str
    pid: int
    url: str
    log: Path
    model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicesStatus:
    """How both services are; `reused` says that start() found the right vLLM running."""

    vllm: ServiceStatus
    gateway: ServiceStatus
    reused: bool = False

    @property
    def is_ready(self) -> bool:
        """Say whether both answer."""
        return self.vllm.state in {"ready", "elsewhere"} and self.gateway.state == "ready"


def start(settings: ServiceSettings) -> ServicesStatus:
    """Bring both services up, vLLM first; return when the gateway says that vLLM answers.

    Raises: MissingError (model or vLLM's environment), PortTakenError, CapacityError before
    anything is started or stopped; ServiceError with the end of the log when a service dies, does not answer in
    `spec.start_timeout_s` or serves another model.
    """
    with files.lock_file(settings.folder / "lock"):
        own = settings.uses_own_vllm
        if own:
            check_model(settings)
        check_ports(settings, SERVICES if own else ("gateway",))
        if own:
            check_memory(settings)
        reused = _ensure(settings, plan_vllm(settings), wait_for_vllm) if own else False
        settings.vacancy.unlink(missing_ok=True)
        _ensure(settings, plan_gateway(settings), wait_for_gateway)
        return status(settings, reused=reused)


def stop(settings: ServiceSettings) -> list[str]:
    """Stop the gateway, then vLLM, with all their children; return the names of those that ran."""
    with files.lock_file(settings.folder / "lock"):
        settings.vacancy.unlink(missing_ok=True)  # who stops them wants them to stay stopped
        return [name for name in reversed(SERVICES) if _end(settings, name)]


def restart(settings: ServiceSettings) -> ServicesStatus:
    """Stop both and start them anew."""
    stop(settings)
    return start(settings)


def status(settings: ServiceSettings, *, reused: bool = False) -> ServicesStatus:
    """Look at both services; starts and stops nothing. Cost: two requests to loopback."""
    host, spec = reach(settings.spec.host), settings.spec
    vllm_url = f"http://{host}:{spec.vllm_port}"
    vllm = _look(settings, "vllm", vllm_url, lambda: _get(f"{vllm_url}/health")[0] == 200)
    if not settings.uses_own_vllm:
        vllm = ServiceStatus(name="vllm", state="elsewhere", pid=0, url=settings.vllm_url, log=vllm.log)
    gateway_url = f"http://{host}:{spec.gateway_port}"
    gateway = _look(settings, "gateway", gateway_url, lambda: _is_gateway_ready(gateway_url))
    return ServicesStatus(vllm=vllm, gateway=gateway, reused=reused)


def plan_vllm(settings: ServiceSettings) -> processes.Program:
    """Return vLLM as it is to run."""
    scratch = settings.scratch
    model = str(settings.model_folder or settings.model)
    argv, extra = vllm_command(
        settings.spec,
        model,
        on_gpu=not has_cpu_build(settings.vllm_python),
        python=str(settings.vllm_python),
        scratch=str(scratch),
    )
    variables = {**extra, **without_secrets(settings.variables, keep=("VLLM_API_KEY",))}
    variables |= {name: value for name, value in extra.items() if name != "OMP_NUM_THREADS"}  # the caller's count wins
    variables["PATH"] = f"{settings.vllm_python.parent}:{variables.get('PATH', os.defpath)}"  # ninja, for CUDA kernels
    for name in ("VLLM_PORT", "VLLM_URL"):  # ours; vLLM would take VLLM_PORT for its internal sockets
        variables.pop(name, None)
    shown = {name: value for name, value in variables.items() if name.startswith(("VLLM_", "CUDA_", "OMP_", "HF_"))}
    digest = digest_of([argv, shown, fingerprint_model(settings), fingerprint_environment(settings.vllm_python)])
    if settings.hf_token and settings.model_folder is None:
        variables["HF_TOKEN"] = settings.hf_token
    return _program(settings, "vllm", argv, variables, digest)


def plan_gateway(settings: ServiceSettings) -> processes.Program:
    """Return the gateway as it is to run."""
    argv, extra = gateway_command(
        settings.spec,
        python=str(settings.gateway_python),
        vllm_url=settings.vllm_url or chat_url(settings.spec),
        variables=settings.variables,
    )
    keep = ("GATEWAY_", "LITE_", "REDIS_", "VLLM_API_KEY", "PYTHONPATH")
    if settings.variables.get("GATEWAY_TRACE_DIRECT", "").lower() in ("1", "true", "yes", "on"):
        keep = (*keep, "WANDB_")  # its child sends to Weave
    variables = {
        **without_secrets(settings.variables, keep=keep),
        **extra,
        **settings.ids,
    }
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH", "")]))
    prefixes = ("GATEWAY_", "LITE_", "REDIS_", "VLLM_", "TATARA_MODEL_", "TATARA_ADAPTER_")
    shown = {
        name: value for name, value in variables.items() if name.startswith(prefixes)
    }  # a new run's id: no restart
    code = [fingerprint_gateway(), fingerprint_environment(settings.gateway_python)]
    return _program(settings, "gateway", argv, variables, digest_of([argv, extra, shown, *code]))


def _program(
    settings: ServiceSettings, name: str, argv: list[str], variables: dict[str, str], digest: str
) -> processes.Program:
    note = {"model": settings.model, "spec": settings.spec.model_dump_json(), "vllm_url": settings.vllm_url}
    if name == "vllm":
        note["vllm_python"] = str(settings.vllm_python)
        note["device"] = "cpu" if has_cpu_build(settings.vllm_python) else "gpu"
        note["fingerprint"] = fingerprint_model(settings)
    else:
        note["ids"] = json.dumps(dict(settings.ids))
    return processes.Program(
        argv=tuple(argv),
        variables=variables,
        identity_file=settings.identity_file(name),
        log=settings.log(name),
        digest=digest,
        note=note,
    )


def wait_for_vllm(settings: ServiceSettings, running: processes.Identity) -> None:
    """Return when vLLM answers under the right model name. Raises ServiceError."""
    base, name = f"http://{reach(settings.spec.host)}:{settings.spec.vllm_port}", settings.spec.served_model_name

    def is_ready() -> bool:
        if _get(f"{base}/health")[0] != 200:
            return False
        code, body = _get(f"{base}/v1/models", key=settings.variables.get("VLLM_API_KEY", ""))
        served = [model.get("id") for model in body.get("data", [])] if code == 200 else []
        if code == 200 and name not in served:
            raise ServiceError(f"vLLM at {base} serves {served} but {name!r} was asked for: stop what else runs there")
        return code == 200

    _wait(settings, "vllm", running, is_ready)


def wait_for_gateway(settings: ServiceSettings, running: processes.Identity) -> None:
    """Return when the gateway answers and reaches vLLM. Raises ServiceError."""
    url = f"http://{reach(settings.spec.host)}:{settings.spec.gateway_port}"
    _wait(settings, "gateway", running, lambda: _is_gateway_ready(url), timeout_s=60.0)


def _ensure(
    settings: ServiceSettings, program: processes.Program, wait: Callable[[ServiceSettings, processes.Identity], None]
) -> bool:
    """Make the service run as planned; return whether it did already."""
    name = program.identity_file.stem
    running = processes.find_alive(program.identity_file)
    reused = running is not None and running.digest == program.digest
    if running is None or not reused:
        if running is not None and name == "vllm":
            files.write_json(settings.vacancy, running.note)
        _end(settings, name)
        if name == "vllm":
            for kind in ("temporary", "cache"):
                (settings.scratch / kind).mkdir(parents=True, exist_ok=True)
        if program.log.exists():
            program.log.replace(program.log.with_suffix(".log.old"))
        running = processes.start_detached(program)
    elif not running.note:  # found by its marker: its record was lost
        processes.write_identity(program.identity_file, replace(running, note=program.note))
    try:
        wait(settings, running)
    except BaseException:  # also Ctrl-C: a service that nobody waits for is an orphan
        _end(settings, name)
        raise
    return reused


def _end(settings: ServiceSettings, name: str) -> bool:
    """Stop a service with all its children; return whether it ran."""
    ended = processes.stop(settings.identity_file(name))
    settings.identity_file(name).unlink(missing_ok=True)
    if ended:
        _logger.info("stopped %s", name)
    return ended


def _wait(
    settings: ServiceSettings,
    name: str,
    running: processes.Identity,
    is_ready: Callable[[], bool],
    *,
    timeout_s: float | None = None,
) -> None:
    begin = time.monotonic()
    limit_s = settings.spec.start_timeout_s if timeout_s is None else timeout_s
    log = settings.log(name)
    while not is_ready():
        if not running.is_alive():
            raise ServiceError(f"{name} died before it was ready; the end of {log}:\n{_tail(settings, log)}")
        if time.monotonic() - begin > limit_s:
            raise ServiceError(
                f"{name} was not ready after {limit_s:g} s and was stopped (raise start_timeout_s if it is slow); "
                f"the end of {log}:\n{_tail(settings, log)}"
            )
        time.sleep(_POLL_S)
    if not running.is_alive():  # someone else answered on the port
        raise ServiceError(f"{name} died but its port answers; the end of {log}:\n{_tail(settings, log)}")
    _logger.info("%s is ready after %.1f s", name, time.monotonic() - begin)


def _tail(settings: ServiceSettings, log: Path) -> str:
    text = processes.last_lines(log)
    return text.replace(settings.hf_token, "<HF_TOKEN>") if settings.hf_token else text


def _look(settings: ServiceSettings, name: str, url: str, is_ready: Callable[[], bool]) -> ServiceStatus:
    running = processes.find_alive(settings.identity_file(name))
    log = settings.log(name)
    if running is None:
        return ServiceStatus(name=name, state="stopped", pid=0, url=url, log=log)
    state = "ready" if is_ready() else "starting"
    return ServiceStatus(name=name, state=state, pid=running.pid, url=url, log=log, model=running.note.get("model", ""))


def _is_gateway_ready(url: str) -> bool:
    code, body = _get(f"{url}/health")
    return code == 200 and body.get("gateway") == "ok" and body.get("vllm") is True


def _get(url: str, *, key: str = "") -> tuple[int, dict[str, Any]]:  # Any: JSON
    """GET without proxies; (0, {}) when nothing answers, {} when the body is no JSON object."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
    try:
        connection.request("GET", parts.path, headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        body = json.loads(response.read() or b"{}")
        return response.status, body if isinstance(body, dict) else {}
    except ValueError:
        return response.status, {}  # pyright: ignore[reportPossiblyUnboundVariable] - only the body raises it
    except (OSError, http.client.HTTPException):
        return 0, {}
    finally:
        connection.close()
