"""A folder's one job in SLURM's queue: submitted, or found again after its parent was killed, and ended.

    Job + LaunchSpec + Work -> SlurmQueue -> tasks.followed_job.run_queued()

A job is known twice: by slurm_job.json in its folder, and by its name, which holds the folder's digest. So a parent
that was killed between sbatch and the file, or anywhere else, leaves one job, and the next run of the same question
follows it.

Ring: edge.  Units: seconds.
"""

import logging
import shutil
import time
from pathlib import Path

from tasks import errors, files, slurm
from tasks.followed_job import job_name
from tasks.job_report import JobReport
from tasks.launch_script import Work, digest_of, render_job, submit_variables
from tasks.lifeline import forget_beats
from tasks.specs import LaunchSpec
from tasks.supervision import Job

_TICK_S = 1.0
_GONE_S = 60.0  # for a cancelled job to be gone
logger = logging.getLogger(__name__)


class SlurmQueue:
    """The job of one folder. Raises SpecError for a folder whose path sbatch would read differently."""

    name = "SLURM"

    def __init__(self, job: Job, spec: LaunchSpec, work: Work) -> None:
        self._job, self._spec, self._script = job, spec, render_job(spec, work)

    def start(self) -> str:
        """Return the id of the job that waits or runs, else submit one."""
        return _find(self._job, digest_of(self._script)) or _submit(self._job, self._spec, self._script)

    def look(self, job_id: str) -> JobReport | None:
        """Return the job's state; None while SLURM is away: the job goes on without it."""
        try:
            return slurm.look(job_id)
        except errors.TransientError as error:
            logger.warning("%s: the job goes on, and is followed by its files", error)
            return None

    def end(self, job_id: str) -> None:
        """End the job, with time for a last checkpoint."""
        _end(job_id, self._job.grace_s)

    def end_left(self) -> None:
        """End whatever job of this folder there is."""
        end_left(self._job.folder, self._job.grace_s, surely=False)


def end_left(folder: Path, grace_s: float, *, surely: bool = True) -> None:
    """End the job that a killed parent left in the queue, or a requeue put there, if one was ever submitted.

    Args:
        folder: the job's.
        grace_s: for a last checkpoint.
        surely: something else is to run in the folder. Else a job that can't be ended now is only told of.
    Raises: TransientError when SLURM can't be asked; with `surely` also when the job is not gone.
    """
    lock = folder / "slurm_job.lock"
    if not lock.exists():
        return
    try:
        slurm.wait_for_submission(lock)
        found = slurm.find(job_name(folder))
    except errors.MissingError as error:
        logger.warning("a SLURM job of %s may be there still: %s", folder, error)
        return
    if found is not None and not found.is_over:
        logger.warning("SLURM job %s of an earlier try is ended", found.job_id)
        _end(found.job_id, grace_s, surely=surely)


def _identity_file(job: Job) -> Path:
    return job.folder / "slurm_job.json"


def _find(job: Job, digest: str) -> str:
    """Return the id of the folder's job that waits or runs, empty for none; one of another script is ended."""
    slurm.wait_for_submission(job.folder / "slurm_job.lock")
    known = files.read_json(_identity_file(job))["job_id"] if _identity_file(job).exists() else ""
    found = slurm.look(known) if known else None
    if found is None or found.is_over or found.name not in ("", job_name(job.folder)):  # another cluster's number
        found = slurm.find(job_name(job.folder))
    while found is not None and found.state == "COMPLETING":  # it ends, or is on its way back into the queue
        time.sleep(_TICK_S)
        found = slurm.look(found.job_id)
    if found is None or found.is_over:
        return ""
    if found.comment not in ("", digest):
        logger.warning("SLURM job %s was submitted with other settings: it is cancelled", found.job_id)
        _end(found.job_id, job.grace_s, surely=True)
        return ""
    logger.info("attached to SLURM job %s, which an earlier try submitted", found.job_id)
    files.write_json(_identity_file(job), {"job_id": found.job_id})  # its submitter may have been killed before
    return found.job_id


def _submit(job: Job, spec: LaunchSpec, script: str) -> str:
    forget_beats(job.folder)  # of an earlier job
    shutil.rmtree(job.folder / "nodes", ignore_errors=True)
    path = job.folder / "job.sbatch"
    files.write_text(path, script)
    job_id = slurm.submit(path, submit_variables(job.env, spec), job.folder / "slurm_job.lock")
    files.write_json(_identity_file(job), {"job_id": job_id})
    size = f"{spec.nodes} nodes, {spec.num_processes} processes"
    logger.info("submitted SLURM job %s: %s, output in %s", job_id, size, job.log)
    return job_id


def _end(job_id: str, grace_s: float, *, surely: bool = False) -> None:
    """End a job: SIGTERM to its processes, time for a last checkpoint, scancel. Says so when SLURM does not take it.

    Raises: TransientError then, with `surely`.
    """
    try:
        if slurm.look(job_id).is_running:
            logger.info("SLURM job %s is told to stop, with %g s for a last checkpoint", job_id, grace_s)
            slurm.tell(job_id)
            _wait_until_over(job_id, grace_s)
        slurm.cancel(job_id)
        if not _wait_until_over(job_id, _GONE_S):
            raise errors.TransientError("it was cancelled and is not gone yet")
    except (errors.TransientError, errors.ServiceError) as error:
        if surely:
            raise errors.TransientError(
                f"SLURM job {job_id} may still run ({error}), and two trainers would write the same checkpoints: "
                f"`scancel {job_id}`, and run this again when it is gone"
            ) from error
        logger.error("SLURM job %s may still run: `scancel %s` (%s)", job_id, job_id, error)


def _wait_until_over(job_id: str, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not (is_over := slurm.look(job_id).is_over) and time.monotonic() < deadline:
        time.sleep(_TICK_S / 2)
    return is_over
