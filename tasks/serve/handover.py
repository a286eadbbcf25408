"""Give the GPU to a trainer, and the place in front of clients back to the last model that was proven.

    train:   release_gpu()            our vLLM leaves the GPU, the gateway stays
    verify:  passed -> remember_verified()
             failed -> restore()      the failed model is stopped, the last verified one started again
    the run failed before that -> serve_again()      the last verified one is started again where ours made way
    a promotion failed in the place of the old one -> go_back()      what was there before is started again

Only what runs by our identity files below `root` is ever stopped.

Ring: edge.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from tasks import files, machine, processes, supervision
from tasks.errors import CorruptError, TataraError
from tasks.serve import services, trial, vacancy
from tasks.serve.fingerprints import fingerprint_model
from tasks.serve.looking import is_alive, this_process
from tasks.serve.settings import ServiceSettings
from tasks.specs import ServeSpec

_LEFT_ALONE, _VERIFIED = "left alone", "the last verified model"
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
        vacancy.note(settings, running)
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
    running = _find_serving(ServiceSettings(model=model, home=root))
    if running is not None and running.note.get("model") == model:
        files.write_json(_memory(root), trial.describe(root, running.note))
        trial.end(root)  # also one that a killed run left: whatever was tried, this is proven


def last_verified(root: Path) -> dict[str, str]:
    """Return what `remember_verified` kept: model, ids and the like; empty when no model was verified here."""
    return _read_memory(root)


def restore(root: Path, failed_model: str, variables: Mapping[str, str] = os.environ) -> str:
    """Stop the services that serve a model which failed, start what is to serve instead; return what was done.

    That is what the failed model had replaced in a promotion, else the last verified model.
    It never raises for a restart that fails: the caller has an AttestationError to raise.

    Args:
        root: the artifact store's root.
        failed_model: the folder of the model that failed, as the ServedModel names it.
        variables: the environment that the services' is made of.
    """
    tried, verified = trial.read(root), _read_memory(root)
    before = tried.before if tried and tried.model == failed_model else {}
    said = _stop_failed(root, failed_model)
    if said.startswith(_LEFT_ALONE):
        return said
    if verified.get("model") == failed_model:
        _memory(root).unlink()
        if not before:
            return f"{said}; it had been verified before, now it is not started again"
    if before:
        return f"{said}; {_start(root, before, 'what served before it', variables)}"
    if not verified:
        return f"{said}; no model was verified here before"
    return f"{said}; {_start(root, verified, _VERIFIED, variables)}"


def go_back(root: Path, run: str, variables: Mapping[str, str] = os.environ) -> str | None:
    """Take a model away that the promotion `run` put in the place of another one; return what was done.

    None when that run has nothing on trial. It never raises for a start that fails.
    """
    tried = trial.read(root)
    if tried is None or tried.run != run:
        return None
    back, what = (tried.before, "what served before it") if tried.before else (_read_memory(root), _VERIFIED)
    if back.get("model") == tried.model:
        said = f"{tried.model} stays: nothing served before it, and it was verified once"
    else:
        said = _stop_failed(root, tried.model)
        if not said.startswith(_LEFT_ALONE):
            said += f"; {_start(root, back, what, variables)}" if back else "; nothing was served here before"
    trial.end(root)
    return said


def _stop_failed(root: Path, failed_model: str) -> str:
    settings = ServiceSettings(model=failed_model, home=root)
    running = _find_serving(settings)
    if running is not None and running.note.get("model") != failed_model:
        return f"{_LEFT_ALONE}: vLLM serves {running.note.get('model') or 'an unknown model'}, not the one that failed"
    stopped = services.stop(settings)
    return f"stopped {' and '.join(stopped)}, which served the model that failed" if stopped else "nothing ran any more"


def serve_again(root: Path, variables: Mapping[str, str] = os.environ) -> str | None:
    """Start the last verified model if ours was stopped to make way and nothing took its place; return what was done.

    Call it when a run has failed, crashed or was cancelled. None when nothing was missing, or when another run made
    the vacancy and still works. A trainer that outlived its run keeps the GPU that was freed for it.
    It never raises for a start that fails: the run has an error of its own.
    """
    settings = ServiceSettings(model="", home=root)
    if not settings.vacancy.exists() or _find_serving(settings) is not None:
        return None
    maker = vacancy.made_by(settings)
    if maker != this_process() and is_alive(maker):
        return None
    if training := supervision.find_running(root):
        return (
            f"vLLM had made way and is not started again: {', '.join(training)} still trains. Its next run goes on "
            "with it and serves; `tatara down` ends it, then `tatara services start` starts what MODEL_DIR names"
        )
    verified = _read_memory(root)
    if verified:
        return f"vLLM had made way for this run; {_start(root, verified, _VERIFIED, variables)}"
    return (
        "vLLM had made way for this run and no model was verified here before: start what is to be served with "
        "`MODEL_DIR=... tatara services start`"
    )


def _start(root: Path, known: Mapping[str, str], what: str, variables: Mapping[str, str]) -> str:
    try:
        settings = ServiceSettings(
            model=known["model"],
            spec=ServeSpec.model_validate_json(known["spec"]),
            home=root,
            variables=variables,
            vllm_url=known["vllm_url"],
            vllm_python=Path(known["vllm_python"]),
            ids=json.loads(known["ids"]),
        )
        if fingerprint_model(settings) != known["fingerprint"]:
            return f"{what} {settings.model} is not whole any more: not started"
        services.start(settings)
    except (TataraError, OSError, KeyError, ValueError) as error:  # KeyError, ValueError: written by another version
        return f"{what} {known.get('model')} did not start: {error}"
    return f"{what} {settings.model} is served again"


def _memory(root: Path) -> Path:
    return root / "services" / "verified" / "vllm.json"


def _read_memory(root: Path) -> dict[str, str]:
    try:
        verified = files.read_json(_memory(root))
    except (OSError, CorruptError):
        return {}
    wanted = {"model", "spec", "vllm_url", "vllm_python", "fingerprint"}
    return {"ids": "{}", **verified} if isinstance(verified, dict) and wanted <= verified.keys() else {}
