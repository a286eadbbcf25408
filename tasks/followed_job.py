"""Run a trainer as a job of a cluster's queue, SLURM's or Ray's, to its end: its state, its lines, its silence.

    Job + LaunchSpec + Queue -> run_queued() -> output.log to the log, metrics.jsonl to a callback -> JobReport
    JobReport -> raise_end() -> one of our errors, with the rank that failed first and its last lines

Ring: edge.  Units: seconds.
"""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Protocol

from tasks import errors, files
from tasks.checkpoints import has_any, say_kept
from tasks.job_report import JobReport
from tasks.launch_script import BEGINS, NO_PROGRESS, NOT_SHARED, STARTS
from tasks.lifeline import HEARTBEAT, read_beats
from tasks.liveness import HangError, Liveness
from tasks.processes import last_lines
from tasks.ranks import find_failed, lines_of, say_ranks
from tasks.ray_driver import DRIVER
from tasks.specs import LaunchSpec
from tasks.supervision import Job, Tail, read_beat, report_new

_TICK_S = 1.0  # between two looks at the files
_OUTPUT_BYTES = 1 << 20
_NUM_LINES = 30
_DECIDES = {"OutOfMemoryError", "CapacityError", "SpecError"}  # of whatever rank: what is done next depends on it
logger = logging.getLogger(__name__)
MetricsFn = Callable[[dict[str, Any]], None]  # Any: JSON values


class Queue(Protocol):
    """What runs the one job of a folder."""

    name: str

    def start(self) -> str:
        """Return the id of the job that is there already, else of a new one."""
        ...

    def look(self, job_id: str) -> JobReport | None:
        """Return a job's state; None while the queue does not answer: the job goes on without it."""
        ...

    def end(self, job_id: str) -> None:
        """End a job, with time for a last checkpoint. Says so when that is not possible."""
        ...

    def end_left(self) -> None:
        """End whatever job of this folder there is."""
        ...


def job_name(folder: Path) -> str:
    """Return the name of the one job of a folder: the artifact's key, and a digest that tells two stores apart."""
    where = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    return f"tatara-{folder.name[:8]}-{where[:12]}"


def run_queued(job: Job, spec: LaunchSpec, queue: Queue, on_metrics: MetricsFn) -> JobReport:
    """Submit the job of this folder, or go on with the one that is there; return how it ended.

    When this process is told to end or fails, the job is ended, with time for a last checkpoint. A cancellation
    from inside is no person's wish (as in `supervise`), and a cluster that is away may come back: the job goes on then.
    One that goes on for `heartbeat_timeout_s` after its result was written is ended, and that is no failure.
    Raises: TimeoutError when it hangs, SpecError when it is refused or a node does not see its folder,
        TransientError when the cluster can't be asked.
    """
    output, metrics = Tail(job.log, from_end=True), Tail(job.metrics, from_end=True)
    job_id = ""
    try:
        job_id = queue.start()
        return _follow(job, spec, queue, job_id, lambda: report_new(output, metrics, on_metrics))
    except (asyncio.CancelledError, errors.TransientError):
        if job_id:
            logger.warning("%s job %s goes on without us, and the next run of this follows it", queue.name, job_id)
        raise
    except BaseException as error:
        if job_id:
            queue.end(job_id)
        elif not isinstance(error, Exception):  # told to end while it was being submitted
            queue.end_left()
        raise
    finally:
        report_new(output, metrics, on_metrics)


def raise_end(end: JobReport, job: Job, spec: LaunchSpec) -> NoReturn:
    """Raise what the end of a job without a result means: what its queue decided, else the first rank that failed."""
    kept, said = say_kept(job.folder / "checkpoints"), end.say_end()
    code = end.exit_code.partition(":")[0]
    if end.state == "CANCELLED":
        raise errors.TrainingError(f"{said}, not by Tatara: {kept}; run again to go on from there")
    if end.is_lost:
        raise errors.TransientError(f"{said}: {kept}")
    if end.state == "OUT_OF_MEMORY":
        raise errors.CapacityError(f"{said}: {kept}; raise TrainSpec.launch.memory, or take more nodes with fsdp2")
    is_late = end.state in {"TIMEOUT", "DEADLINE"}
    if code == str(NO_PROGRESS) or (is_late and not has_any(job.folder / "checkpoints")):
        limit = spec.time_limit or "of the partition"
        raise errors.SpecError(
            f"{said}: within the time limit ({limit}) no checkpoint was written, so it would begin anew for ever; "
            f"raise TrainSpec.launch.time_limit (or lower stop_notice_s, {spec.stop_notice_s} s)"
        )
    is_blind = end.system == "SLURM" and end.state == "FAILED" and _unseen(job.folder, end.job_id, spec.nodes)
    if code == str(NOT_SHARED) or is_blind:  # on Ray the driver tells it
        raise errors.SpecError(_say_not_shared(end, job.folder, spec))
    if is_late:
        raise errors.TransientError(f"{said}: {kept}")
    _raise_failure(said, job)


def _raise_failure(said: str, job: Job) -> NoReturn:
    """Raise the error of the rank that failed first: what it wrote down, or that it could not.

    What the job's driver wrote down itself comes before what any rank says.
    """
    text = _last_run(job.log)
    told = {int(path.stem.partition("_")[2] or 0): files.read_json(path) for path in job.folder.glob("failure*.json")}
    failed = None if told.get(0, {}).get("by") == DRIVER else find_failed(text)
    rank = failed.rank if failed else min(told, default=0)
    first = f"; {failed}" if failed else ""
    decided = (number for number, one in sorted(told.items()) if one.get("by") == DRIVER or one["error"] in _DECIDES)
    rank = next(decided, rank)  # NCCL ends the others within seconds, with a signal that looks like a crash
    if rank in told:
        cls = getattr(errors, told[rank]["error"], errors.TrainingError)
        raise cls(f"{told[rank]['message']} ({said}{first}; output in {job.log})")
    lines = lines_of(text, rank) or text.strip().splitlines()[-_NUM_LINES:] or ["(no output)"]
    kept = say_kept(job.folder / "checkpoints")
    raise errors.TrainingError(f"{said}{first}: {kept}, the next try goes on. Its last lines:\n" + "\n".join(lines))


def _last_run(log: Path) -> str:
    """Return the output since the job began, or was started or requeued, last.  Cost: at most 1 MiB is read."""
    text = _read_end(log, _OUTPUT_BYTES)
    return text[max(0, *(text.rfind(mark) for mark in (BEGINS, STARTS))) :]


def _follow(job: Job, spec: LaunchSpec, queue: Queue, job_id: str, report: Callable[[], bool]) -> JobReport:
    seen = JobReport(job_id=job_id, system=queue.name, state="PENDING")
    liveness, asked, since, whole_since = None, -spec.poll_s, 0.0, 0.0
    said: tuple[object, ...] = ()
    while True:
        if time.monotonic() - asked >= spec.poll_s:
            asked, before = time.monotonic(), seen
            seen = queue.look(job_id) or seen
            if said != (said := (seen.state, seen.reason, seen.restarts, seen.nodes)):
                logger.info("%s", seen.say())
            if not seen.is_running or seen.restarts != before.restarts:
                liveness = None
        has_moved = report()
        if seen.is_over:
            return seen
        now = time.monotonic()
        if (job.folder / "result.json").exists():  # mostly the queue has only not said so yet
            whole_since = whole_since or now
            if now - whole_since > job.heartbeat_timeout_s:
                logger.warning(
                    "%s goes on %.0f s after its result was written: it is ended, the result is whole",
                    *(seen.label, now - whole_since),
                )
                queue.end(job_id)
                return seen
        elif seen.is_running:
            if liveness is None:
                liveness, since = _fresh(job, now), now
            if has_moved:
                liveness.see_progress(now)
            _judge(job, seen, liveness, now)
            if now - since > spec.shared_timeout_s and _unseen(job.folder, job_id, spec.nodes):
                raise errors.SpecError(_say_not_shared(seen, job.folder, spec))
        time.sleep(min(_TICK_S, spec.poll_s))


def _fresh(job: Job, now: float) -> Liveness:
    return Liveness(stall_timeout_s=job.stall_timeout_s, heartbeat_timeout_s=job.heartbeat_timeout_s, now=now)


def _judge(job: Job, seen: JobReport, liveness: Liveness, now: float) -> None:
    """Look at the heartbeat. Raises TimeoutError for a hang, with each rank's last step."""
    liveness.see_beat(read_beat(job.folder / HEARTBEAT), now)
    try:
        if line := liveness.judge(now):
            logger.warning("%s", line)
    except HangError as hang:
        ranks = say_ranks(read_beats(job.folder), time.time())
        raise TimeoutError(f"{seen.label}: {hang}; {ranks or 'no rank has begun'}") from None


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
    missing = ", ".join(map(str, _unseen(folder, seen.job_id, spec.nodes))) or "one"
    return (
        f"{seen.label} on {seen.nodes or 'its nodes'}: node {missing} of 0 to {spec.nodes - 1} did not show "
        f"that it sees {folder}: put TATARA_HOME, this checkout and its Python on storage that every node mounts at "
        f"the same path. The job's last lines:\n{last_lines(folder / 'output.log', 10)}"
    )
