"""Ask SLURM through its own commands: submit, find, look, cancel.

    job script -> submit() -> job id -> look() -> JobReport -> tell(), cancel()

Ring: edge.  Units: seconds.
"""

import fcntl
import logging
import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tasks import files
from tasks.errors import MissingError, ServiceError, SpecError, TransientError
from tasks.slurm_report import JobReport, is_passing, is_unknown, read_accounting, read_job

_ASK_S = 120.0  # sbatch itself waits for a controller that is away, then says so
logger = logging.getLogger(__name__)


def submit(script: Path, variables: Mapping[str, str], lock: Path) -> str:
    """Submit a job script; return the job's id.

    sbatch inherits a lock: whoever finds its caller killed waits until it has ended, and then looks for its job.
    Raises: MissingError without sbatch, TransientError when SLURM is away, SpecError with the words of its refusal.
    """
    with _held(lock) as handle:
        said = _run(["sbatch", "--parsable", str(script)], variables, keep=(handle,))
    if said.returncode:
        words = said.stderr.strip()
        if is_passing(words):
            raise TransientError(f"SLURM could not be asked to start the training: {words}")
        raise SpecError(f"SLURM refused the job: {words}; look at TrainSpec.launch, the script is {script}")
    if said.stderr.strip():
        logger.warning("%s", said.stderr.strip())
    return said.stdout.strip().partition(";")[0]


def require_commands() -> str:
    """Return the version of SLURM's commands. Raises MissingError when they are not on PATH."""
    return _run(["sbatch", "--version"]).stdout.strip()


def wait_for_submission(lock: Path) -> None:
    """Return when no sbatch of an earlier, killed caller runs any more."""
    with _held(lock):
        pass


def find(name: str) -> JobReport | None:
    """Return our queued or running job of this name. Raises TransientError when SLURM can't be asked."""
    said = _ask(["squeue", "--me", "--noheader", f"--name={name}", "--format=%A"])
    ids = sorted({int(word) for word in said.split() if word.isdecimal()})
    return look(str(ids[-1])) if ids else None


def look(job_id: str) -> JobReport:
    """Return what SLURM knows of a job, from its accounting when the controller has forgotten it.

    Raises: TransientError when it can't be asked.
    """
    said = _run(["scontrol", "show", "job", "--oneliner", job_id])
    if said.returncode == 0:
        return read_job(said.stdout.strip())
    if not is_unknown(said.stderr):
        raise TransientError(f"SLURM does not answer: {said.stderr.strip()}")
    kept = _run(
        ["sacct", "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode,NodeList", "-j", job_id]
    )
    return read_accounting(job_id, kept.stdout if kept.returncode == 0 else "")


def tell(job_id: str) -> None:
    """Send SIGTERM to the processes of a job, whatever the cluster's KillWait is; its script waits for them."""
    _run(["scancel", "--signal=TERM", job_id])


def cancel(job_id: str) -> None:
    """End a job. Raises ServiceError when SLURM does not take it."""
    said = _run(["scancel", job_id])
    if said.returncode and not is_unknown(said.stderr):
        raise ServiceError(f"SLURM job {job_id} was not cancelled ({said.stderr.strip()}): run `scancel {job_id}`")


@contextmanager
def _held(lock: Path) -> Iterator[int]:
    """Hold a lock and give its descriptor; it is held on by a child that inherited it.  Waits for such a child."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with files.where_supported():
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _ask(argv: Sequence[str]) -> str:
    said = _run(argv)
    if said.returncode:
        raise TransientError(f"SLURM does not answer: `{shlex.join(argv)}`: {said.stderr.strip()}")
    return said.stdout


def _run(
    argv: Sequence[str], variables: Mapping[str, str] | None = None, keep: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands. Raises: MissingError when it is not there, TransientError when it hangs."""
    try:
        return subprocess.run(
            argv,
            env=None if variables is None else dict(variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ASK_S,
            check=False,
            pass_fds=keep,
        )
    except FileNotFoundError:
        raise MissingError(
            f"{argv[0]} is not on this machine's PATH, and TrainSpec.launch.launcher is 'slurm': run the Prefect "
            "worker where jobs are submitted (a login node), or choose launcher='local'"
        ) from None
    except subprocess.TimeoutExpired:
        raise TransientError(f"SLURM does not answer: `{shlex.join(argv)}` took more than {_ASK_S:g} s") from None
