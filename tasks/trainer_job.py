"""Run a trainer process for a verb and turn its end into a result or one of our errors.

    job.json -> python -m tasks.<verb>.worker job.json  (or torchrun) -> result.json | failure.json | neither

Ring: edge. Imports no torch: this is the parent's side.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks import errors, files
from tasks.environment import without_secrets
from tasks.processes import last_lines
from tasks.supervision import Job, supervise

ProgressFn = Callable[[dict[str, Any]], None]  # Any: a metrics record


_LAST_WORD_BYTES = 1 << 20  # with less than this free a trainer may have been unable to leave failure.json
_KILL_AFTER_S = 2.0  # the trainer kills itself when its grace is over; this is for one that can't any more


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How a trainer runs: on how many processes, how patiently it is watched, what its environment adds."""

    num_processes: int = 1
    stall_timeout_s: float = 1800.0
    heartbeat_timeout_s: float = 300.0
    stop_grace_s: float = 25.0
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)  # W&B's key may be one


def run_trainer(
    module: str,
    folder: Path,
    job: dict[str, Any],  # Any: JSON values
    terms: Terms,
    on_progress: ProgressFn,
) -> dict[str, Any]:  # Any: JSON values
    """Run `module` on `job` in `folder` until its result is there; return the result.

    A trainer that an earlier, killed parent left running is followed, not started again.
    Raises: the error class that the trainer named in failure.json; TrainingError with its last lines
        when it died without a word (SIGKILL, out of memory by the kernel).
    """
    result, failure = folder / "result.json", folder / "failure.json"
    if result.exists():
        return files.read_json(result)
    files.write_json(folder / "job.json", job)
    argv = [sys.executable, "-m", module, str(folder / "job.json")]
    if terms.num_processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={terms.num_processes}"]
        argv = [sys.executable, *launcher, "-m", module, str(folder / "job.json")]
    failure.unlink(missing_ok=True)
    child = Job(
        argv=argv,
        env={**_environment(terms.num_processes), **terms.variables},
        folder=folder,
        stall_timeout_s=terms.stall_timeout_s,
        heartbeat_timeout_s=terms.heartbeat_timeout_s,
        grace_s=terms.stop_grace_s + _KILL_AFTER_S,
    )
    try:
        supervise(child, on_progress)
    except TimeoutError as error:
        raise errors.TrainingError(f"{module}: {error}; its last lines:\n{last_lines(child.log)}") from error
    if result.exists():
        return files.read_json(result)
    if failure.exists():
        told = files.read_json(failure)
        cls = getattr(errors, told["error"], errors.TrainingError)
        raise cls(f"{told['message']} (output in {child.log})")
    if files.free_bytes(folder) < _LAST_WORD_BYTES:
        raise errors.CapacityError(
            f"{module} died on a full disk: {files.free_bytes(folder)} bytes are free below {folder}, too few to write "
            f"down why; free some space and run again, it goes on from its last checkpoint. Its last lines:\n"
            f"{last_lines(child.log)}"
        )
    raise errors.TrainingError(
        f"{module} died without a result (killed, or out of memory?); the next try goes on from its last checkpoint. "
        f"Its last lines:\n{last_lines(child.log)}"
    )


def _environment(num_processes: int) -> dict[str, str]:
    """Return the trainer's environment: ours without secrets that it has no use for.

    One process sees one GPU: on a machine with several, transformers' Trainer would spread each batch over all of them
    (DataParallel), which no plan of ours reckons with.
    """
    env = without_secrets(os.environ)
    env.update(
        PYTHONUNBUFFERED="1",
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        PYTHONWARNINGS="ignore",
    )
    env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi numbers them, whose memory was looked at
    if num_processes == 1:
        env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    root = str(Path(__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return env
