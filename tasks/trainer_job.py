"""Run a trainer process for a verb and turn its end into a result or one of our errors.

    job.json -> python -m tasks.<verb>.worker job.json  (torchrun, SLURM, Ray) -> result.json | failure.json | neither

Ring: edge. Imports no torch: this is the parent's side.
"""

import asyncio
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tasks import errors, files, ray_job, slurm_job
from tasks.artifacts import Artifact, BaseCheckpoint, TrainedAdapter, digest_files, folder_digest
from tasks.environment import without_secrets
from tasks.followed_job import Queue, job_name, raise_end, run_queued
from tasks.launch_script import JOIN_OVER, Work, first_argv, render_join
from tasks.processes import last_lines, stop
from tasks.specs import LaunchSpec
from tasks.supervision import Job, supervise

ProgressFn = Callable[[dict[str, Any]], None]  # Any: a metrics record

logger = logging.getLogger(__name__)
_LAST_WORD_BYTES = 1 << 20  # with less than this free a trainer may have been unable to leave failure.json
_ROOT = Path(__file__).resolve().parents[1]
_GPU_DEFAULTS = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as nvidia-smi numbers them, whose memory was looked at
}
_TORCHRUN_KILLS_S = 30  # its own patience with ranks that were told to stop
_KILL_AFTER_S = 2.0  # the trainer kills itself when its grace is over; this is for one that can't any more


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How a trainer runs: on how many processes and where, how patiently it is watched, what its environment adds."""

    num_processes: int = 1
    launch: LaunchSpec = field(default_factory=LaunchSpec)
    stall_timeout_s: float = 1800.0
    heartbeat_timeout_s: float = 300.0
    stop_grace_s: float = 25.0
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)  # W&B's key may be one
    python: str = sys.executable


def made_adapter(
    key: str,
    folder: Path,
    parents: tuple[Artifact, ...],
    base: BaseCheckpoint,
    result: dict[str, Any],  # Any: JSON values
) -> TrainedAdapter:
    """Return the artifact of a worker that left `adapter/` in `folder`, and its figures in `result`."""
    adapter_folder = folder / "adapter"
    return TrainedAdapter(
        key=key,
        folder=str(folder),
        parents=tuple(parent.ref for parent in parents),
        adapter_folder=str(adapter_folder),
        adapter_digest=folder_digest(digest_files(adapter_folder)),
        base_folder=base.model_folder,
        base_digest=base.model_digest,
        **result,
    )


def run_trainer(
    module: str,
    folder: Path,
    job: dict[str, Any],  # Any: JSON values
    terms: Terms,
    on_progress: ProgressFn,
) -> dict[str, Any]:  # Any: JSON values
    """Run `module` on `job` in `folder` until its result is there; return the result.

    A trainer that an earlier, killed parent left running is followed, not started again.
    Raises: the error class that the trainer named in failure.json; LostError with its last lines
        when it died without a word (SIGKILL, out of memory by the kernel); TrainingError when it hangs.
    """
    result, launcher = folder / "result.json", terms.launch.launcher
    # A job in a queue would write into a folder that is whole, or beside us.
    if result.exists() or launcher != "slurm":
        slurm_job.end_left(folder, terms.stop_grace_s, surely=not result.exists())
    if result.exists() or launcher != "ray":
        ray_job.end_left(folder, terms.stop_grace_s, surely=not result.exists())
    if result.exists():
        return files.read_json(result)
    files.write_json(folder / "job.json", job)
    work = Work(
        name=job_name(folder),
        module=module,
        folder=str(folder),
        root=str(_ROOT),
        python=terms.python,
        variables=_added_variables(terms),
    )
    for path in folder.glob("failure*.json"):  # a rank's each
        path.unlink()
    child = Job(
        argv=_argv(terms, work),
        env={**_environment(terms), **terms.variables},
        folder=folder,
        stall_timeout_s=terms.stall_timeout_s,
        heartbeat_timeout_s=terms.heartbeat_timeout_s,
        grace_s=terms.stop_grace_s + _KILL_AFTER_S,
    )
    try:
        if terms.launch.is_elsewhere:
            stop(child.identity_file, child.grace_s)  # one of this machine that a killed parent left
            end = run_queued(child, terms.launch, _queue(child, terms, work), on_progress)
            if not result.exists():
                raise_end(end, child, terms.launch)
        elif launcher == "torchrun":
            _run_joined(child, terms.launch, work, on_progress)
        else:
            supervise(child, on_progress)
    except TimeoutError as error:
        raise errors.TrainingError(f"{module}: {error}; its last lines:\n{last_lines(child.log)}") from error
    if result.exists():
        return files.read_json(result)
    if told := _first_failure(folder):
        cls = getattr(errors, told["error"], errors.TrainingError)
        raise cls(f"{told['message']} (output in {child.log})")
    if files.free_bytes(folder) < _LAST_WORD_BYTES:
        raise errors.CapacityError(
            f"{module} died on a full disk: {files.free_bytes(folder)} bytes are free below {folder}, too few to write "
            f"down why; free some space and run again, it goes on from its last checkpoint. Its last lines:\n"
            f"{last_lines(child.log)}"
        )
    raise errors.LostError(
        f"{module} died without a result (killed, or out of memory?); the next try goes on from its last checkpoint. "
        f"Its last lines:\n{last_lines(child.log)}"
    )


def _argv(terms: Terms, work: Work) -> list[str]:
    """Return the command of this machine; a job in a queue has its own in its script."""
    if terms.launch.launcher == "torchrun":
        return first_argv(terms.launch, work)
    if terms.num_processes == 1:
        return [work.python, "-m", work.module, work.job_file]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={terms.num_processes}"]
    return [work.python, *launcher, "-m", work.module, work.job_file]


def _queue(child: Job, terms: Terms, work: Work) -> Queue:
    """Return what runs the job. SLURM hands our environment on; Ray shows what it is given, so it gets no secrets."""
    if terms.launch.launcher == "slurm":
        return slurm_job.SlurmQueue(child, terms.launch, work)
    shown, needs = ray_job.split_variables(terms.variables)
    variables = {**work.variables, **_GPU_DEFAULTS, **shown}
    return ray_job.RayQueue(child, terms.launch, replace(work, variables=variables), needs)


def _run_joined(child: Job, launch: LaunchSpec, work: Work, on_progress: ProgressFn) -> None:
    """Run this machine's part; when a person ends it, those on the other machines end too."""
    over = Path(work.folder) / JOIN_OVER
    over.unlink(missing_ok=True)
    _invite(launch, work)
    try:
        supervise(child, on_progress)
    except asyncio.CancelledError:
        raise  # it goes on, and so do they
    except BaseException as error:
        if not isinstance(error, Exception):
            over.touch()
        raise


def _invite(launch: LaunchSpec, work: Work) -> None:
    """Say what is to be started on the other machines; it waits there until this one is ready."""
    script = Path(work.folder) / "join.sh"
    files.write_text(script, render_join(launch, work))
    if launch.nodes > 1:
        numbers = f"1 to {launch.nodes - 1}" if launch.nodes > 2 else "1"
        logger.info("start on each other machine, with its number (%s): bash %s NUMBER", numbers, script)


def _first_failure(folder: Path) -> dict[str, Any]:  # Any: JSON values
    """Return what rank 0 wrote down of its end, or the rank because of which it was told to stop."""
    told = [files.read_json(path) for path in sorted(folder.glob("failure*.json"))]  # failure.json is the first
    causes = [one for one in told if one["error"] != errors.TransientError.__name__]
    return next(iter(causes or told), {})


def _added_variables(terms: Terms) -> dict[str, str]:
    """Return what a trainer's environment has beside what every process has."""
    shutdown_s = max(_TORCHRUN_KILLS_S, math.ceil(terms.stop_grace_s + _KILL_AFTER_S) + 3)  # the ranks end before
    return {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(shutdown_s),
        "PYTHONUNBUFFERED": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "WANDB_ERROR_REPORTING": "false",  # TRL imports weave, which would report to Sentry
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")])),
    }


def _environment(terms: Terms) -> dict[str, str]:
    """Return the trainer's environment: ours without secrets that it has no use for.

    One process sees one GPU: on a machine with several, transformers' Trainer would spread each batch over all of them
    (DataParallel), which no plan of ours reckons with.
    """
    env = {**without_secrets(os.environ), **_added_variables(terms)}
    for name, value in _GPU_DEFAULTS.items():
        env.setdefault(name, value)
    if terms.num_processes == 1:
        env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if terms.launch.launcher == "torchrun":
        env.update(terms.launch.environment)
    return env
