"""Start, stop and look at vLLM and the gateway: `python -m deployments.services start|stop|restart|status`.

    environment variables -> ServiceSettings -> tasks/serve/services.py -> two lines on the terminal

The variables and defaults are those of the start script that this replaces: MODEL_DIR, VLLM_PORT,
LITE_GATEWAY_PORT, VLLM_URL, LITE_PROMPT_MAX_LEN, FILE_QUEUE_PATH, FALLBACK_ON_VLLM_DOWN, HF_TOKEN.
Beside them: HOST (an address; 127.0.0.1 unless given), SERVED_MODEL_NAME, MAX_MODEL_LEN, DTYPE,
GPU_MEMORY_UTILIZATION, START_TIMEOUT_S, TATARA_HOME. `restart` and `status` go on with the model
and ports of what runs, unless a variable says otherwise.

Ring: edge; loads neither Prefect nor torch.  Exit status: 0 done, 1 an error, 3 not ready (status).
"""

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tasks import files, processes
from tasks.environment import read_secret
from tasks.errors import CorruptError, SpecError, TataraError
from tasks.serve import services
from tasks.serve.command import DEFAULT_MODEL
from tasks.serve.settings import ServiceSettings
from tasks.serve.traffic import active_slot
from tasks.specs import ServeSpec, is_address

ACTIONS = ("start", "stop", "restart", "status")
_SPEC_VARIABLES = {
    "HOST": "host",
    "VLLM_PORT": "vllm_port",
    "LITE_GATEWAY_PORT": "gateway_port",
    "SERVED_MODEL_NAME": "served_model_name",
    "MAX_MODEL_LEN": "max_model_len",
    "DTYPE": "dtype",
    "GPU_MEMORY_UTILIZATION": "gpu_memory_utilization",
    "START_TIMEOUT_S": "start_timeout_s",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one action; return the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    if len(words) != 1 or words[0] not in ACTIONS:
        print(f"usage: python -m deployments.services {'|'.join(ACTIONS)}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    action = words[0]
    try:
        settings = read_settings(os.environ, goes_on=action in {"restart", "status"})
        return run_action(action, settings)
    except TataraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except PermissionError as error:  # after `sudo tatara ...`, say
        print(
            f"error: {error}: do it as the user whose it is, or set TATARA_HOME to a folder of yours", file=sys.stderr
        )
        return 1


def run_action(action: str, settings: ServiceSettings) -> int:
    """Do it, tell what came of it, and return the exit status."""
    if action == "stop":
        stopped = services.stop(settings)
        print(f"stopped {' and '.join(stopped)}" if stopped else "nothing was running")
        return 0
    act = {"start": services.start, "restart": services.restart, "status": services.status}[action]
    now = act(settings)
    for service in filter(None, (now.vllm, now.candidate, now.gateway)):
        pid = f"pid {service.pid}" if service.pid else ""
        print(f"{service.name:8} {service.state:9} {service.url:24} {pid:12} {service.model}".rstrip())
        if service.restarts or service.why:
            print(f"         started again {service.restarts} times{': ' if service.why else ''}{service.why}")
    return 0 if now.is_ready else 3


def read_settings(variables: Mapping[str, str], *, goes_on: bool = False) -> ServiceSettings:
    """Return the settings that environment variables ask for; empty ones count as unset.

    With `goes_on`, what the running services were started with stands in for the defaults.
    Raises SpecError naming the variable that is wrong.
    """
    given = {name: value for name, value in variables.items() if value}
    home = Path(given.get("TATARA_HOME", ".tatara")).expanduser().resolve()
    before = _read_note(home / "services") if goes_on else {}
    values = json.loads(before.get("spec", "{}"))
    values |= {field: given[name] for name, field in _SPEC_VARIABLES.items() if name in given}
    check_host(values.get("host", "127.0.0.1"))
    try:
        spec = ServeSpec.model_validate(values)
    except ValueError as error:  # pydantic's ValidationError
        raise SpecError(f"a variable is wrong ({', '.join(_SPEC_VARIABLES)}): {error}") from error
    return ServiceSettings(
        model=given.get("MODEL_DIR", before.get("model", DEFAULT_MODEL)),
        spec=spec,
        home=home,
        hf_token=read_secret(given, "HF_TOKEN"),
        vllm_url=given.get("VLLM_URL", before.get("vllm_url", "")),
        variables=given,
    )


def check_host(host: str) -> None:
    """Raise SpecError unless `host` is an address: some shells export HOST as the machine's name."""
    if not is_address(host):
        raise SpecError(
            f"HOST is {host!r} but an IP address such as 127.0.0.1 or 0.0.0.0 is expected: unset HOST, or set one"
        )


def _read_note(folder: Path) -> dict[str, str]:
    """Return what the vLLM that serves was started with, also when it died or made way for a training.

    The gateway's own note comes last: it has followed promotions since.
    """
    slot = folder / f"{active_slot(folder)}.json"
    for found in (processes.find_alive(slot), processes.read_identity(slot)):
        if found is not None and found.note:
            return found.note
    try:
        return {name: value for name, value in files.read_json(folder / "vacant.json").items() if name != "vacated_by"}
    except (OSError, CorruptError, AttributeError):
        gateway = processes.find_alive(folder / "gateway.json")
        return gateway.note if gateway else {}


if __name__ == "__main__":
    sys.exit(main())
