"""Become vLLM, in the foreground: for systemd and containers, `python -m deployments.vllm.entrypoint`.

    MODEL_DIR and the other variables -> argv and environment -> execve

The same command as `deployments.services start`, but whoever started us watches it. MODEL_DIR may
also be a ServedModel's manifest (or its folder): the model folder and name are read from it.

Ring: edge; loads neither Prefect nor torch.
"""

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from deployments.services import read_settings
from tasks import files, processes
from tasks.environment import hide_secrets
from tasks.errors import CorruptError, TataraError
from tasks.serve.preflight import check_memory, check_model, check_ports
from tasks.serve.services import plan_vllm
from tasks.serve.settings import ServiceSettings

_logger = logging.getLogger(__name__)


def main() -> int:
    """Check, then replace this process by vLLM; returns only with an error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        service = prepare(os.environ)
    except TataraError as error:
        _logger.error("error: %s", error)
        return 1
    _logger.info("starting %s", " ".join(hide_secrets(service.argv)))
    os.execve(service.argv[0], service.argv, service.variables)  # noqa: S606 - no shell is the point
    raise AssertionError("execve returned")


def prepare(variables: Mapping[str, str]) -> processes.Program:
    """Return vLLM as it is to run, after every check. Raises the errors of `tasks.serve.preflight`."""
    settings = follow_manifest(read_settings(variables))
    check_model(settings)
    check_ports(settings, ("vllm",))
    check_memory(settings)
    for folder in (settings.scratch / "temporary", settings.cache):
        folder.mkdir(parents=True, exist_ok=True)
    return plan_vllm(settings)


def follow_manifest(settings: ServiceSettings) -> ServiceSettings:
    """Return settings that point at the model of a ServedModel manifest, if MODEL_DIR is one; else the same."""
    path = Path(settings.model).expanduser()
    manifest = path if path.name == "manifest.json" else path / "manifest.json"
    if not manifest.is_file() or (path / "config.json").is_file():
        return settings
    content = files.read_json(manifest)
    artifact = content.get("artifact", {})
    if "model_folder" not in artifact or "served_model_name" not in artifact:
        raise CorruptError(
            f"{manifest} is no manifest of a served model (it has {sorted(artifact)}): set MODEL_DIR to a model folder"
        )
    spec = settings.spec.model_copy(update={"served_model_name": artifact["served_model_name"]})
    return replace(settings, model=artifact["model_folder"], spec=spec)


if __name__ == "__main__":
    sys.exit(main())
