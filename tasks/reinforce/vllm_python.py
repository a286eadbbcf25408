"""Which Python runs a worker whose rollouts vLLM generates: vLLM's own, with the trainer's packages behind its own.

    find_engine() -> Engine -> variables() -> `python -m tasks.reinforce.beside_vllm job.json`

vLLM and Prefect pin other versions of fastapi, so vLLM has an environment of its own. The worker knows no Prefect:
it runs there, and finds TRL, PEFT and datasets in the trainer's environment, which stands behind on sys.path. That
holds as long as both have the same Python and the same torch.

Ring: edge (asks an interpreter).
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tasks.errors import MissingError

PACKAGES = "TATARA_TRAINER_PACKAGES"  # the variable that tells beside_vllm.py what to put behind
_ROOT = Path(__file__).resolve().parents[2]
_ASK = (
    "import json, platform, sys; from importlib.metadata import version; "
    "json.dump([platform.python_version(), version('torch'), version('vllm')], sys.stdout)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An interpreter with vLLM. `packages` is what goes behind its own; empty where it has the trainer's too."""

    python: str
    packages: str = ""


def find_engine() -> Engine:
    """Return where vLLM can run in the trainer's process.

    Raises: MissingError when there is no vLLM, or one for another Python or torch.
    """
    if importlib.util.find_spec("vllm") is not None:
        return Engine(python=sys.executable)
    python = os.environ.get("TATARA_VLLM_PYTHON") or str(_ROOT / ".venv-vllm/bin/python")
    theirs = _ask(python)
    mine = [platform.python_version(), version("torch")]
    if theirs[:2] != mine:
        raise MissingError(
            f"ReinforceSpec.rollouts = 'vllm', but vLLM {theirs[2]} at {python} has Python {theirs[0]} and torch "
            f"{theirs[1]}, the trainer {mine[0]} and {mine[1]}: one process can't hold both. Make both environments "
            "with `make setup`, or choose 'transformers'"
        )
    paths = sysconfig.get_paths()
    return Engine(python=python, packages=os.pathsep.join(dict.fromkeys([paths["purelib"], paths["platlib"]])))


def _ask(python: str) -> list[str]:
    """Return the versions of Python, torch and vLLM there."""
    try:
        told = subprocess.run([python, "-I", "-c", _ASK], check=True, capture_output=True, timeout=60)
        return json.loads(told.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise MissingError(
            f"ReinforceSpec.rollouts = 'vllm', but there is no vLLM beside the trainer nor at {python} ({error}): make "
            "its environment with `make setup`, name one in TATARA_VLLM_PYTHON, or choose 'transformers'"
        ) from error


def variables(engine: Engine, *, on_gpu: bool) -> dict[str, str]:
    """Return what the worker's environment has because of vLLM."""
    common = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    common |= {"VLLM_LOGGING_LEVEL": "WARNING", PACKAGES: engine.packages}
    return common if on_gpu else common | {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"}  # GiB
