"""Run a trainer as a SLURM job to its end, or follow the one that a dead parent left in the queue.

    Job + LaunchSpec + Work -> run_job() -> output.log to the log, metrics.jsonl to a callback -> JobReport
    JobReport -> raise_end() -> one of our errors, with the rank that failed first and its last lines

A job is known twice: by slurm_job.json in its folder, and by its name, which holds the folder's digest. So a parent
that was killed between sbatch and the file, or anywhere else, leaves one job, and the next run of the same question
follows it.

Ring: edge.  Units: seconds.
"""

import asyncio
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tasks import errors, files, slurm
from tasks.checkpoints import say_kept
from tasks.launch_script import NO_PROGRESS, NOT_SHARED, STARTS, Work, digest_of, render_job, submit_variables
from tasks.lifeline import HEARTBEAT, forget_beats, read_beats
from tasks.liveness import HangError, Liveness
from tasks.processes import last_lines
from tasks.ranks import find_failed, lines_of, say_ranks
from tasks.slurm_report import JobReport
from tasks.specs import LaunchSpec
from tasks.supervision import Job, Tail, read_beat, report_new

_TICK_S = 1.0  # between two looks at the files
_GONE_S = 60.0  # for a cancelled job to be gone
_OUTPUT_BYTES = 1 << 20
_DECIDES = {"OutOfMemoryError", "CapacityError", "SpecError"}  # of whatever rank: what is done next depends on it
logger = logging.getLogger(__name__)
MetricsFn = Callable[[dict[str, Any]], None]  # Any: JSON values


def job_name(folder: Path) -> str:
    """Return the name of the one job of a folder: the artifact's key, and a digest that tells two stores apart."""
    where = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    return f"tatara-{folder.name[:8]}-{where[:12]}"


def run_job(job: Job, spec: LaunchSpec, work: Work, on_metrics: MetricsFn) -> JobReport:
    """Submit the job of this folder, or go on with the one that is there; return how it ended.

    When this process is told to end or fails, the job is cancelled, with time for a last checkpoint. A cancellation
    from inside is no person's wish (as in `supervise`): the job goes on then.
    Raises: TimeoutError when it hangs, SpecError when SLURM refuses it or a node does not see its folder,
        TransientError when SLURM can't be asked.
    """
    script = render_job(spec, work)
    output, metrics = Tail(job.log, from_end=True), Tail(job.metrics, from_end=True)
    job_id = ""
    try:
        job_id = _find(job, spec, digest_of(script)) or _submit(job, spec, script)
        return _follow(job, spec, job_id, lambda: report_new(output, metrics, on_metrics))
    except asyncio.CancelledError:
        logger.warning("cancelled from inside: SLURM job %s goes on, and the next run of this follows it", job_id)
        raise
    except BaseException as error:
        if job_id:
            _end(job_id, job.grace_s)
        elif not isinstance(error, Exception):  # told to end while sbatch waited for its answer
            end_left(job.folder, job.grace_s)
        raise
    finally:
        report_new(output, metrics, on_metrics)


def end_left(folder: Path, grace_s: float) -> None:
    """End the job that a killed parent left in the queue, or a requeue put there, if one was ever submitted."""
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
        _end(found.job_id, grace_s)


def raise_end(end: JobReport, job: Job, spec: LaunchSpec) -> NoReturn:
    """Raise what the end of a job without a result means: what SLURM decided first, then the first rank that failed."""
    kept, said = say_kept(job.folder / "checkpoints"), end.say_end()
    code = end.exit_code.partition(":")[0]
    if end.state == "CANCELLED":
        raise errors.TrainingError(f"{said}, not by Tatara: {kept}; run again to go on from there")
    if end.is_lost:
        raise errors.TransientError(f"{said}: {kept}")
    if end.state == "OUT_OF_MEMORY":
        raise errors.CapacityError(f"{said}: {kept}; raise TrainSpec.launch.memory, or take more nodes with fsdp2")
    if code == str(NO_PROGRESS):
        limit = spec.time_limit or "of the partition"
        raise errors.SpecError(
            f"{said}: within the time limit ({limit}) no checkpoint was written, so it would be requeued for ever; "
            f"raise TrainSpec.launch.time_limit (or lower stop_notice_s, {spec.stop_notice_s} s)"
        )
    if code == str(NOT_SHARED) or (end.state == "FAILED" and _unseen(job.folder, end.job_id, spec.nodes)):
        raise errors.SpecError(_say_not_shared(end, job.folder, spec))
    if end.state in {"TIMEOUT", "DEADLINE"}:
        raise errors.TransientError(f"{said}: {kept}")
    _raise_failure(said, job)


def _raise_failure(said: str, job: Job) -> NoReturn:
    """Raise the error of the rank that failed first: what it wrote down, or that it could not."""
    text = _last_run(job.log)
    failed = find_failed(text)
    told = {int(path.stem.partition("_")[2] or 0): files.read_json(path) for path in job.folder.glob("failure*.json")}
    rank = failed.rank if failed else min(told, default=0)
    first = f"; {failed}" if failed else ""
    decided = (number for number, one in sorted(told.items()) if one["error"] in _DECIDES)
    rank = next(decided, rank)  # NCCL ends the others within seconds, with a signal that looks like a crash
    if rank in told:
        cls = getattr(errors, told[rank]["error"], errors.TrainingError)
        raise cls(f"{told[rank]['message']} ({said}{first}; output in {job.log})")
    lines = lines_of(text, rank) or last_lines(job.log).splitlines()
    kept = say_kept(job.folder / "checkpoints")
    raise errors.TrainingError(f"{said}{first}: {kept}, the next try goes on. Its last lines:\n" + "\n".join(lines))


def _last_run(log: Path) -> str:
    """Return the output since the job was started, or requeued, last.  Cost: at most 1 MiB is read."""
    return _read_end(log, _OUTPUT_BYTES).rpartition(STARTS)[2]


def _identity_file(job: Job) -> Path:
    return job.folder / "slurm_job.json"


def _find(job: Job, spec: LaunchSpec, digest: str) -> str:
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
        _end(found.job_id, job.grace_s)
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


def _follow(job: Job, spec: LaunchSpec, job_id: str, report: Callable[[], bool]) -> JobReport:
    seen, liveness, asked, since = JobReport(job_id=job_id, state="PENDING"), None, -spec.poll_s, 0.0
    said: tuple[object, ...] = ()
    while True:
        if time.monotonic() - asked >= spec.poll_s:
            asked, before = time.monotonic(), seen
            seen = _look(job_id) or seen
            if said != (said := (seen.state, seen.reason, seen.restarts, seen.nodes)):
                logger.info("%s", seen.say())
            if not seen.is_running or seen.restarts != before.restarts:
                liveness = None
        has_moved = report()
        if seen.is_over:
            return seen
        now = time.monotonic()
        if seen.is_running and not (job.folder / "result.json").exists():  # else only SLURM has not said so yet
            if liveness is None:
                liveness, since = _fresh(job, now), now
            if has_moved:
                liveness.see_progress(now)
            _judge(job, job_id, liveness, now)
            if now - since > spec.shared_timeout_s and _unseen(job.folder, job_id, spec.nodes):
                raise errors.SpecError(_say_not_shared(seen, job.folder, spec))
        time.sleep(min(_TICK_S, spec.poll_s))


def _fresh(job: Job, now: float) -> Liveness:
    return Liveness(stall_timeout_s=job.stall_timeout_s, heartbeat_timeout_s=job.heartbeat_timeout_s, now=now)


def _judge(job: Job, job_id: str, liveness: Liveness, now: float) -> None:
    """Look at the heartbeat. Raises TimeoutError for a hang, with each rank's last step."""
    liveness.see_beat(read_beat(job.folder / HEARTBEAT), now)
    try:
        if line := liveness.judge(now):
            logger.warning("%s", line)
    except HangError as hang:
        ranks = say_ranks(read_beats(job.folder), time.time())
        raise TimeoutError(f"SLURM job {job_id}: {hang}; {ranks or 'no rank has begun'}") from None


def _look(job_id: str) -> JobReport | None:
    """Return the job's state; None while SLURM is away: the job goes on without it."""
    try:
        return slurm.look(job_id)
    except errors.TransientError as error:
        logger.warning("%s: the job goes on, and is followed by its files", error)
        return None


def _end(job_id: str, grace_s: float) -> None:
    """End a job: SIGTERM to its processes, time for a last checkpoint, scancel. Says so when SLURM does not take it."""
    try:
        if slurm.look(job_id).is_running:
            logger.info("SLURM job %s is told to stop, with %g s for a last checkpoint", job_id, grace_s)
            slurm.tell(job_id)
            _wait_until_over(job_id, grace_s)
        slurm.cancel(job_id)
        if not _wait_until_over(job_id, _GONE_S):
            logger.warning("SLURM job %s was cancelled and is not gone yet", job_id)
    except (errors.TransientError, errors.ServiceError) as error:
        logger.error("SLURM job %s may still run: `scancel %s` (%s)", job_id, job_id, error)


def _wait_until_over(job_id: str, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not (is_over := slurm.look(job_id).is_over) and time.monotonic() < deadline:
        time.sleep(_TICK_S / 2)
    return is_over


def _unseen(folder: Path, job_id: str, num_nodes: int) -> list[int]:
    """Return the numbers of the job's nodes that have not shown that they see the folder."""
    shown = (folder / "nodes" / str(number) for number in range(num_nodes))
    return [int(path.name) for path in shown if _read_end(path, 64).strip() != job_id]


def _read_end(path: Path, num_bytes: int) -> str:
    try:
        with path.open("rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - num_bytes))
            return handle.read().decode(errors="replace")
    except OSError:
        return ""


def _say_not_shared(seen: JobReport, folder: Path, spec: LaunchSpec) -> str:
    unseen = ", ".join(map(str, _unseen(folder, seen.job_id, spec.nodes))) or "one"
    return (
        f"SLURM job {seen.job_id} on {seen.nodes or 'its nodes'}: node {unseen} of 0 to {spec.nodes - 1} did not show "
        f"that it sees {folder}: put TATARA_HOME, this checkout and its Python on storage that every node mounts at "
        f"the same path. The job's last lines:\n{last_lines(folder / 'output.log', 10)}"
    )
