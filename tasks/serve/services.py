"""Start vLLM, wait until it answers, then the gateway; stop, restart and tell how they are.

    ServiceSettings -> start() -> ServicesStatus      (the same question twice: the second is free)

What runs already with the same command, model files, code, packages and settings is kept; anything else of ours
on these ports is replaced; anything foreign is named and left alone.

Ring: edge.  Units: seconds, bytes.
Trap: the model folder's path says nothing about its weights. A re-merged model under the same
      path must not be answered by the old server, so sizes and times of its files are part of
      the digest.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tasks import files, machine, processes
from tasks.environment import read_secret, without_secrets
from tasks.errors import ServiceError, TransientError
from tasks.procfs import send_signal
from tasks.serve import trial, vacancy
from tasks.serve.asking import get_json
from tasks.serve.command import chat_url, gateway_command, reach, vllm_command
from tasks.serve.fingerprints import fingerprint_environment, fingerprint_gateway, fingerprint_model
from tasks.serve.looking import (
    ServicesStatus,
    ServiceStatus,
    follow,
    is_alive,
    is_gateway_ready,
    status,
    this_process,
)
from tasks.serve.preflight import check_memory, check_model, check_ports, has_cpu_build
from tasks.serve.settings import ROOT, RUN_ID, SERVICES, SLOTS, ServiceSettings, digest_of
from tasks.serve.traffic import read_shares, share_of, write_traffic

__all__ = ["ServiceSettings", "ServiceStatus", "ServicesStatus", "follow", "restart", "start", "status", "stop"]

_POLL_S = 0.25
_SUPERVISOR = Path(__file__).with_name("supervisor.py")

_logger = logging.getLogger(__name__)


def start(settings: ServiceSettings) -> ServicesStatus:
    """Bring both services up, vLLM first; return when the gateway says that vLLM answers.

    Raises: MissingError (model or vLLM's environment), PortTakenError, CapacityError before
    anything is started or stopped; ServiceError with the end of the log when a service dies, does not answer in
    `spec.start_timeout_s` or serves another model.
    """
    with files.lock_file(settings.folder / "lock"):
        settings, own = follow(settings), settings.uses_own_vllm
        if own:
            check_model(settings)
        check_ports(settings, SERVICES if own else ("gateway",))
        end_candidate(settings)
        if own:
            check_memory(settings)
        reused = ensure(settings, plan_vllm(settings), wait_for_vllm) if own else False
        settings.vacancy.unlink(missing_ok=True)
        if own:
            _give_all(settings, reused=reused)
        ensure(settings, plan_gateway(settings), wait_for_gateway)
        return status(settings, reused=reused)


def end_candidate(settings: ServiceSettings) -> bool:
    """Stop what waits in the other slot; return whether something did. Raises TransientError while a promotion runs."""
    waiting = processes.find_alive(settings.identity_file(settings.other_slot))
    if waiting is None:
        return False
    promoter = waiting.note.get("promoter", "")
    if promoter != this_process() and is_alive(promoter):
        raise TransientError(
            f"a promotion (pid {promoter.partition('@')[0]}) has a new model in {settings.other_slot}: wait until it "
            "ends, or cancel its flow run"
        )
    return end(settings, settings.other_slot)


def _give_all(settings: ServiceSettings, *, reused: bool) -> None:
    """Send all requests to this slot's vLLM; what is served already keeps the run's id that it has."""
    share, now = share_of(settings), read_shares(settings.folder)
    if len(now) == 1 and reused and (now[0].slot, now[0].url) == (share.slot, share.url):
        known = {name: value for name, value in now[0].ids.items() if name in share.ids}
        if not share.ids or {**share.ids, RUN_ID: ""} == {**known, RUN_ID: ""}:
            return
    write_traffic(settings, [share])


def stop(settings: ServiceSettings) -> list[str]:
    """Stop the gateway, then vLLM, with all their children; return the names of those that ran."""
    with files.lock_file(settings.folder / "lock"):
        settings.vacancy.unlink(missing_ok=True)  # who stops them wants them to stay stopped
        trial.end(settings.home)
        ended = [name for name in ("gateway", *reversed(SLOTS)) if end(settings, name)]
        settings.upstreams_file.unlink(missing_ok=True)
        return ended


def restart(settings: ServiceSettings) -> ServicesStatus:
    """Stop both and start them anew; answers of the same model still lead back to where it came from."""
    now, shares = follow(settings), read_shares(settings.folder)
    known = processes.read_identity(now.identity_file(now.slot))
    if settings.uses_own_vllm:
        check_model(settings)  # before anything stops: what runs is better than nothing
    made_of = settings.model, fingerprint_model(settings) if settings.uses_own_vllm else ""
    if shares and known and not settings.ids and made_of == (known.note.get("model"), known.note.get("fingerprint")):
        settings = replace(settings, ids=shares[0].ids)
    stop(settings)
    return start(settings)


def plan_vllm(settings: ServiceSettings) -> processes.Program:
    """Return vLLM as it is to run."""
    scratch = settings.scratch
    model = str(settings.model_folder or settings.model)
    argv, extra = vllm_command(
        settings.spec.model_copy(update={"vllm_port": settings.vllm_port}),
        model,
        on_gpu=not has_cpu_build(settings.vllm_python),
        python=str(settings.vllm_python),
        scratch=str(scratch),
        cache=str(settings.cache),
    )
    variables = {**extra, **without_secrets(settings.variables, keep=("VLLM_API_KEY",))}
    variables |= {name: value for name, value in extra.items() if name != "OMP_NUM_THREADS"}  # the caller's count wins
    variables["PATH"] = f"{settings.vllm_python.parent}:{variables.get('PATH', os.defpath)}"  # ninja, for CUDA kernels
    if key := read_secret(variables, "VLLM_API_KEY"):
        variables["VLLM_API_KEY"] = key  # what it compares with is what clients can send
    for name in ("VLLM_PORT", "VLLM_URL"):  # ours; vLLM would take VLLM_PORT for its internal sockets
        variables.pop(name, None)
    shown = {name: value for name, value in variables.items() if name.startswith(("VLLM_", "CUDA_", "OMP_", "HF_"))}
    digest = digest_of([argv, shown, fingerprint_model(settings), fingerprint_environment(settings.vllm_python)])
    if settings.hf_token and settings.model_folder is None:
        variables["HF_TOKEN"] = settings.hf_token
    return _program(settings, settings.slot, argv, variables, digest)


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
    lite = settings.variables.get("LITE_MODEL", "").strip()
    if lite and "://" not in lite and not Path(lite).expanduser().is_dir():
        keep = (*keep, "HF_TOKEN")  # its child loads that id of the Hub, which may be private
    if settings.uses_own_vllm:
        extra["GATEWAY_UPSTREAMS_FILE"] = str(settings.upstreams_file)
    else:
        extra |= settings.ids
    variables = {**without_secrets(settings.variables, keep=keep), **extra}
    if key := read_secret(variables, "VLLM_API_KEY"):
        variables["VLLM_API_KEY"] = key
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH", "")]))
    prefixes = ("GATEWAY_", "LITE_", "REDIS_", "VLLM_", "HF_TOKEN", "TATARA_MODEL_", "TATARA_ADAPTER_")
    shown = {name: value for name, value in variables.items() if name.startswith(prefixes)}
    code = [fingerprint_gateway(), fingerprint_environment(settings.gateway_python)]
    return _program(settings, "gateway", argv, variables, digest_of([argv, extra, shown, *code]))


def _program(
    settings: ServiceSettings, name: str, argv: list[str], variables: dict[str, str], digest: str
) -> processes.Program:
    note = {"model": settings.model, "spec": settings.spec.model_dump_json(), "vllm_url": settings.vllm_url}
    if name in SLOTS:
        note["vllm_python"] = str(settings.vllm_python)
        note["device"] = "cpu" if has_cpu_build(settings.vllm_python) else "gpu"
        note["fingerprint"] = fingerprint_model(settings)
        note["promoter"], note["run"] = this_process(), settings.ids.get(RUN_ID, "")
        if note["device"] == "gpu":
            note["gpu_free_bytes"] = json.dumps([gpu.free_bytes for gpu in machine.list_gpus()])
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
    base, name = f"http://{reach(settings.spec.host)}:{settings.vllm_port}", settings.spec.served_model_name

    def is_ready() -> bool:
        if get_json(f"{base}/health")[0] != 200:
            return False
        code, body = get_json(f"{base}/v1/models", key=read_secret(settings.variables, "VLLM_API_KEY"))
        served = [model.get("id") for model in body.get("data", [])] if code == 200 else []
        if code == 200 and name not in served:
            raise ServiceError(f"vLLM at {base} serves {served} but {name!r} was asked for: stop what else runs there")
        return code == 200

    _wait(settings, settings.slot, running, is_ready)


def wait_for_gateway(settings: ServiceSettings, running: processes.Identity) -> None:
    """Return when the gateway answers and reaches vLLM. Raises ServiceError."""
    url = f"http://{reach(settings.spec.host)}:{settings.spec.gateway_port}"
    _wait(settings, "gateway", running, lambda: is_gateway_ready(url), timeout_s=60.0)


def ensure(
    settings: ServiceSettings, program: processes.Program, wait: Callable[[ServiceSettings, processes.Identity], None]
) -> bool:
    """Make the service run as planned; return whether it did already."""
    name = program.identity_file.stem
    running = processes.find_alive(program.identity_file)
    reused = running is not None and running.digest == program.digest
    if running is None or not reused:
        if running is not None and name in SLOTS:
            vacancy.note(settings, running)
        end(settings, name)
        if name in SLOTS:
            for folder in (settings.scratch / "temporary", settings.cache):
                folder.mkdir(parents=True, exist_ok=True)
        if program.log.exists():
            program.log.replace(program.log.with_suffix(".log.old"))
        settings.state_file(name).unlink(missing_ok=True)
        running = processes.start_detached(supervised(settings, program))
    elif not running.note:  # found by its marker: its record was lost
        processes.write_identity(program.identity_file, replace(running, note=program.note))
    try:
        wait(settings, running)
    except BaseException:  # also Ctrl-C: a service that nobody waits for is an orphan
        end(settings, name)
        raise
    send_signal(running.pid, running.started, signal.SIGUSR1)  # from here on its supervisor starts it again
    return reused


def supervised(settings: ServiceSettings, program: processes.Program) -> processes.Program:
    """Return the program under a supervisor: started again when it dies, its log rotated."""
    name = program.identity_file.stem
    argv = (sys.executable, "-I", "-S", str(_SUPERVISOR), str(settings.state_file(name)), str(program.log), "--")
    return replace(program, argv=(*argv, *program.argv))


def end(settings: ServiceSettings, name: str) -> bool:
    """Stop a service with all its children; return whether it ran."""
    running = processes.read_identity(settings.identity_file(name))
    ended = processes.stop(settings.identity_file(name))
    if ended and running is not None and running.note.get("gpu_free_bytes"):
        missing = machine.wait_for_gpu_memory(json.loads(running.note["gpu_free_bytes"]))
        if missing:
            _logger.warning(
                "%s is gone but its GPU memory is not all free: %s (does somebody else use it?)", name, missing
            )
    settings.identity_file(name).unlink(missing_ok=True)
    settings.state_file(name).unlink(missing_ok=True)
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
