"""Give the GPU to a trainer, and the place in front of clients back to the last model that was proven.

    train:   release_gpu()            our vLLM leaves the GPU, the gateway stays
    verify:  passed -> remember_verified()
             failed -> restore()      the failed model is stopped, the last verified one started again
    the run failed before that -> serve_again()      the last verified one is started again where ours made way

Only what runs by our identity files below `root` is ever stopped.

Ring: edge.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from tasks import files, machine, processes
from tasks.errors import CorruptError, TataraError
from tasks.serve import services
from tasks.serve.fingerprints import fingerprint_model
from tasks.serve.settings import ServiceSettings
from tasks.serve.traffic import read_shares
from tasks.specs import ServeSpec

logger = logging.getLogger(__name__)


def release_gpu(root: Path) -> str | None:
    """Stop our vLLM if it holds a GPU; return what was done, None when there was nothing to do.

    Args:
        root: the artifact store's root (TATARA_HOME), where the services' records are.
    """
    settings = ServiceSettings(model="", home=root)
    if not settings.folder.exists():
        return None
    settings = services.follow(settings)
    with files.lock_file(settings.folder / "lock"):
        services.end_candidate(settings)
        identity_file = settings.identity_file(settings.slot)
        running = processes.find_alive(identity_file)
        if running is None or not _holds_gpu(running):
            return None
        files.write_json(settings.vacancy, running.note)
        services.end(settings, settings.slot)
        model = running.note.get("model", "a model")
        return (
            f"stopped our vLLM (pid {running.pid}, it served {model}) to free the GPU; the gateway stays and says so, "
            "the serve step starts vLLM again, or the end of a run that fails"
        )


def free_gpu(root: Path) -> None:
    """Run release_gpu and log what it did: the trainer's hook."""
    said = release_gpu(root)
    if said:
        logger.warning("%s", said)


def holds_gpu(root: Path) -> bool:
    """Say whether our vLLM holds a GPU that `release_gpu` would free."""
    running = _find_serving(ServiceSettings(model="", home=root))
    return running is not None and _holds_gpu(running)


def _find_serving(settings: ServiceSettings) -> processes.Identity | None:
    settings = services.follow(settings)
    return processes.find_alive(settings.identity_file(settings.slot))


def _holds_gpu(running: processes.Identity) -> bool:
    device = running.note.get("device")
    return device == "gpu" or (device is None and bool(machine.list_gpus()))  # None: its record was lost


def remember_verified(root: Path, model: str) -> None:
    """Keep what serves `model` now as the state to go back to. Call it after a passed attestation."""
    settings = ServiceSettings(model=model, home=root)
    running, shares = _find_serving(settings), read_shares(settings.folder)
    if running is not None and running.note.get("model") == model:
        ids = json.dumps(dict(shares[0].ids)) if shares else "{}"
        files.write_json(_memory(root), {**running.note, "ids": ids})


def last_verified(root: Path) -> dict[str, str]:
    """Return what `remember_verified` kept: model, ids and the like; empty when no model was verified here."""
    return _read_memory(root)


def restore(root: Path, failed_model: str, variables: Mapping[str, str] = os.environ) -> str:
    """Stop the services that serve a model which failed, start the last verified one; return what was done.

    It never raises for a restart that fails: the caller has an AttestationError to raise.

    Args:
        root: the artifact store's root.
        failed_model: the folder of the model that failed, as the ServedModel names it.
        variables: the environment that the services' is made of.
    """
    failed = ServiceSettings(model=failed_model, home=root)
    running = _find_serving(failed)
    if running is not None and running.note.get("model") != failed_model:
        return f"left alone: vLLM serves {running.note.get('model') or 'an unknown model'}, not the one that failed"
    stopped = services.stop(failed)
    said = f"stopped {' and '.join(stopped)}, which served the model that failed" if stopped else "nothing ran any more"
    verified = _read_memory(root)
    if not verified:
        return f"{said}; no model was verified here before"
    if verified["model"] == failed_model:
        _memory(root).unlink()
        return f"{said}; it had been verified before, now it is not started again"
    return f"{said}; {_start_verified(root, verified, variables)}"


def serve_again(root: Path, variables: Mapping[str, str] = os.environ) -> str | None:
    """Start the last verified model if ours was stopped to make way and nothing took its place; return what was done.

    Call it when a run has failed or was cancelled: its trainer is gone then. None when nothing was missing.
    It never raises for a start that fails: the run has an error of its own.
    """
    settings = ServiceSettings(model="", home=root)
    if not settings.vacancy.exists() or _find_serving(settings) is not None:
        return None
    verified = _read_memory(root)
    if verified:
        return f"vLLM had made way for this run; {_start_verified(root, verified, variables)}"
    return (
        "vLLM had made way for this run and no model was verified here before: start what is to be served with "
        "`MODEL_DIR=... tatara services start`"
    )


def _start_verified(root: Path, verified: Mapping[str, str], variables: Mapping[str, str]) -> str:
    settings = ServiceSettings(
        model=verified["model"],
        spec=ServeSpec.model_validate_json(verified["spec"]),
        home=root,
        variables=variables,
        vllm_url=verified["vllm_url"],
        vllm_python=Path(verified["vllm_python"]),
        ids=json.loads(verified["ids"]),
    )
    try:
        if fingerprint_model(settings) != verified["fingerprint"]:
            return f"the last verified model {settings.model} is not whole any more: not started"
        services.start(settings)
    except (TataraError, OSError) as error:
        return f"the last verified model {settings.model} did not start: {error}"
    return f"the last verified model {settings.model} is served again"


def _memory(root: Path) -> Path:
    return root / "services" / "verified" / "vllm.json"


def _read_memory(root: Path) -> dict[str, str]:
    try:
        verified = files.read_json(_memory(root))
    except (OSError, CorruptError):
        return {}
    wanted = {"model", "spec", "vllm_url", "vllm_python", "fingerprint"}
    return {"ids": "{}", **verified} if isinstance(verified, dict) and wanted <= verified.keys() else {}
