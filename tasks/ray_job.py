"""A folder's one job on a Ray cluster: submitted, or found again after its parent was killed, and stopped.

    Job + LaunchSpec + Work -> RayQueue -> tasks.followed_job.run_queued()
    job's folder: ray_driver.py (runs on the cluster's head), ray_job.json (its plan), node.sh (what each node runs)

A job's name is made of its folder's digest and a number that is written down before it is submitted, so a parent that
was killed anywhere leaves one job, which the next run of the same question follows. What Ray's dashboard shows of it
is the path of the driver and a digest; the plan holds no secrets either.

Ring: edge (network).  Units: seconds.
"""

import logging
import math
import os
import shlex
import shutil
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from tasks import errors, files
from tasks.environment import holds_secret
from tasks.followed_job import job_name
from tasks.job_report import JobReport
from tasks.launch_script import BEGINS, NOT_SHARED, STARTS, Work, render_node
from tasks.lifeline import forget_beats
from tasks.ray_cluster import find_dashboard, require_resources
from tasks.ray_driver import LOST_NODE
from tasks.ray_errors import MEANINGS
from tasks.ray_follow import Health, Patience, count_nodes, stop_job, submit, try_to_stop
from tasks.ray_jobs import Job as RayJob
from tasks.ray_jobs import JobState, RayJobs, choose_attempt
from tasks.specs import LaunchSpec
from tasks.supervision import Job

_LOST_AFTER_S, _HEALTH_S = 900.0, 30.0
_KILL_AFTER_S = 20.0  # from the end of the grace: the driver ends what is left, and then itself
_STATES = {"PENDING": "PENDING", "RUNNING": "RUNNING", "SUCCEEDED": "COMPLETED", "STOPPED": "CANCELLED"}
_DRIVER = Path(__file__).with_name("ray_driver.py")
_BINDER = Path(__file__).with_name("ends_with_parent.py")
_MARK = "tatara_digest"
logger = logging.getLogger(__name__)


class RayQueue:
    """The job of one folder, on the cluster that the spec or RAY_ADDRESS names."""

    name = "Ray"

    def __init__(self, job: Job, spec: LaunchSpec, work: Work, needs: tuple[str, ...]) -> None:
        self._job, self._spec, self._work, self._needs = job, spec, work, needs
        self._jobs = RayJobs(dashboard(spec), os.environ)
        self._health, self._counted, self._answered = Health("its job ends with it, if it was of it"), 0.0, 0.0
        self._script = render_node(spec, work)

    def start(self) -> str:
        """Return the id of the job that waits or runs, else submit one."""
        folder, known = self._job.folder, _known(self._job.folder)
        if known and known["url"] != self._jobs.url:
            end_left(folder, self._job.grace_s)
        elif (
            known and (found := self._jobs.find(known["submission_id"])) and found.metadata.get(_MARK) != self._digest()
        ):
            _end_surely(self._jobs, folder, known["submission_id"], self._job.grace_s)  # of other settings
        _note_end(folder, has_ended=False)  # a job of the same number may be submitted again
        number = choose_attempt(self._jobs, job_name(folder), _identity_file(folder))
        job_id = f"{job_name(folder)}-{number}"
        found = self._jobs.find(job_id)
        if found and found.is_done:  # it succeeded, and its result was lost
            self._jobs.delete(job_id)
        if found and not found.is_done:
            logger.info("attached to Ray job %s, which an earlier try submitted", job_id)
        else:
            self._submit(job_id)
        self._answered = time.monotonic()
        return job_id

    def look(self, job_id: str) -> JobReport | None:
        """Return the job's state; None while the dashboard is away: the job goes on without it.

        Raises: TransientError when it is away for long, SpecError when the cluster could not start the job at all.
        """
        try:
            state = self._jobs.find(job_id)
            if time.monotonic() - self._counted > _HEALTH_S:
                self._counted = time.monotonic()
                count_nodes(self._jobs, self._health)
        except errors.TransientError as error:
            away_s = time.monotonic() - self._answered
            if away_s > _LOST_AFTER_S:
                raise errors.TransientError(f"{self._jobs.url} did not answer for {away_s:.0f} s ({error})") from error
            logger.warning("%s: the job goes on, and is followed by its files", error)
            return None
        self._answered = time.monotonic()
        if state is None or state.is_done:
            _note_end(self._job.folder)
        return self._report(job_id, state)

    def end(self, job_id: str) -> None:
        """Stop the job. Ray sends SIGTERM to its driver, and waits as long as was said when it was submitted."""
        logger.info("Ray job %s is told to stop, with %g s for a last checkpoint", job_id, self._job.grace_s)
        if try_to_stop(self._jobs, job_id, _stop_wait_s(self._job.grace_s) + _KILL_AFTER_S):
            _note_end(self._job.folder)

    def end_left(self) -> None:
        """Stop whatever job of this folder there is."""
        end_left(self._job.folder, self._job.grace_s, surely=False)

    def _digest(self) -> str:
        return sha256(f"{self._plan('')}\n{self._script}".encode()).hexdigest()[:16]

    def _plan(self, job_id: str) -> dict[str, object]:
        spec, folder = self._spec, str(self._job.folder)
        return {
            "job_id": job_id,
            "folder": folder,
            "nodes": spec.nodes,
            "bundle": bundle(spec),
            "reserve_timeout_s": spec.reserve_timeout_s,
            "grace_s": self._job.grace_s,
            "address": spec.address,
            "port": spec.master_port,
            "first_port": 20000 + int(sha256(folder.encode()).hexdigest(), 16) % 20000,
            "needs": list(self._needs),
            "binder": str(_BINDER),
            "begins": BEGINS,
            "starts": STARTS,
            "meanings": MEANINGS,
        }

    def _submit(self, job_id: str) -> None:
        folder = self._job.folder
        forget_beats(folder)  # of an earlier job
        shutil.rmtree(folder / "nodes", ignore_errors=True)
        files.write_text(folder / "ray_driver.py", _DRIVER.read_text())
        files.write_text(folder / "node.sh", self._script)
        plan = folder / "ray_plan.json"
        files.write_json(plan, self._plan(job_id))
        driver = shlex.quote(str(folder / "ray_driver.py"))
        unseen = f"echo tatara: the head does not see {shlex.quote(str(folder))} >&2; exit {NOT_SHARED}"
        words = shlex.join([*shlex.split(self._spec.ray_python), "-u", str(folder / "ray_driver.py"), str(plan)])
        job = RayJob(
            submission_id=job_id,
            entrypoint=f"[ -r {driver} ] || {{ {unseen}; }}; exec {words}",
            env_vars={"RAY_JOB_STOP_WAIT_TIME_S": str(_stop_wait_s(self._job.grace_s))},  # Ray's own is three seconds
            metadata={_MARK: self._digest()},
        )
        submit(self._jobs, job, Patience(poll_s=self._spec.poll_s, lost_after_s=_LOST_AFTER_S))
        size = f"{self._spec.nodes} nodes, {self._spec.num_processes} processes"
        logger.info("submitted Ray job %s: %s, output in %s", job_id, size, self._job.log)

    def _report(self, job_id: str, state: JobState | None) -> JobReport:
        if state is None:
            return JobReport(job_id=job_id, system=self.name, state="REVOKED")  # the cluster was started anew
        code = "" if state.exit_code is None else str(state.exit_code)
        if state.status == "FAILED" and not code:  # not by its entrypoint: Ray lost it, or ran out of memory
            said = state.message.strip().partition("\n")[0]
            return JobReport(job_id=job_id, system=self.name, state="REVOKED", reason=said)
        if state.status == "FAILED" and not _shows(self._job.folder, "driver", job_id):
            raise errors.SpecError(self._say_not_begun(job_id, state))
        said = "NODE_FAIL" if code == str(LOST_NODE) else _STATES.get(state.status, state.status)
        if said == "RUNNING" and not _shows(self._job.folder, "0", job_id):
            said = "PENDING"  # its driver runs, and waits for nodes
        reason = "its nodes are not free" if state.status == "RUNNING" else ""
        return JobReport(
            job_id=job_id, system=self.name, state=said, reason=reason, exit_code=code, nodes="the cluster"
        )

    def _say_not_begun(self, job_id: str, state: JobState) -> str:
        if state.exit_code == NOT_SHARED:
            return (
                f"Ray job {job_id}: the head of {self._jobs.url} does not see {self._job.folder}: put TATARA_HOME, "
                "this checkout and its Python on storage that every node mounts at the same path"
            )
        return (
            f"Ray job {job_id} could not be started with {self._spec.ray_python} on the head of {self._jobs.url}: name "
            f"a Python there that has ray in TrainSpec.launch.ray_python. Ray says: {state.message.strip()[-2000:]}"
        )


def dashboard(spec: LaunchSpec) -> str:
    """Return the URL of the launch's cluster. Raises MissingError when none is named."""
    return find_dashboard(spec.ray_address, os.environ, "TrainSpec.launch.ray_address")


def bundle(spec: LaunchSpec) -> dict[str, float]:
    """Return what a launch wants of each node, as Ray names it.

    >>> bundle(LaunchSpec(launcher="ray", nodes=2, gpus_per_node=8, gpu_memory_gb=80, gpu_type="h100"))
    {'CPU': 1, 'GPU': 8, 'accelerator_type:H100': 0.001}
    """
    gpus = {"GPU": spec.gpus_per_node} if spec.gpus_per_node else {}
    kind = {f"accelerator_type:{spec.gpu_type.upper()}": 0.001} if gpus and spec.gpu_type else {}
    return {"CPU": spec.cpus_per_task or 1, **gpus, **kind}


def check_cluster(spec: LaunchSpec) -> str:
    """Say what the cluster has. Raises CapacityError: what is missing; UnavailableError when it does not answer."""
    jobs = RayJobs(dashboard(spec), os.environ)
    try:
        nodes, version = [node.resources for node in jobs.nodes()], jobs.version()
    finally:
        jobs.close()
    way_out = "lower nodes and gpus_per_node of TrainSpec.launch"
    return f"Ray {version}, {require_resources(nodes, spec.nodes, bundle(spec), jobs.url, way_out)}"


def split_variables(variables: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the variables that may stand in a plan, and the names of those that only the nodes themselves may hold.

    >>> split_variables({"WANDB_PROJECT": "p", "WANDB_API_KEY": "secret"})
    ({'WANDB_PROJECT': 'p'}, ('WANDB_API_KEY',))
    """
    secret = tuple(name for name, value in variables.items() if holds_secret(name, value))
    return {name: value for name, value in variables.items() if name not in secret}, secret


def end_left(folder: Path, grace_s: float, *, surely: bool = True) -> None:
    """Stop the job that a killed parent left on its cluster, if one was ever submitted.

    Args:
        folder: the job's.
        grace_s: for a last checkpoint.
        surely: something else is to run in the folder. Else a job that can't be stopped now is only told of.
    Raises: TransientError when nobody can say, after a long while, that it has ended; AccessError.
    """
    known = _known(folder)
    if not known or known.get("has_ended"):
        return
    jobs, job_id = RayJobs(known["url"], os.environ), known["submission_id"]
    try:
        if surely:
            _end_surely(jobs, folder, job_id, grace_s)
        else:  # not written down: its submission may still be on its way
            try_to_stop(jobs, job_id, _stop_wait_s(grace_s) + _KILL_AFTER_S)
    finally:
        jobs.close()


def _end_surely(jobs: RayJobs, folder: Path, job_id: str, grace_s: float) -> None:
    """Return when the job has ended: what is started next would write the same checkpoints. Raises as `end_left`."""
    path, wait_s = _identity_file(folder), _stop_wait_s(grace_s) + _KILL_AFTER_S
    way_out = (
        f"two trainers would write the same checkpoints. If you know that the job is gone, remove {path} and run this "
        "again"
    )

    def say(error: errors.TransientError) -> None:
        logger.warning(
            "Ray job %s may still run (%s): asking again for %g s, %s", job_id, error, _LOST_AFTER_S, way_out
        )

    try:
        has_ended = stop_job(jobs, job_id, wait_s, Patience(lost_after_s=_LOST_AFTER_S), say)
    except errors.TransientError as error:
        said = f"Ray job {job_id} may still run: {jobs.url} did not answer for {_LOST_AFTER_S:g} s ({error})"
        raise errors.TransientError(f"{said}; {way_out}") from error
    except errors.AccessError as error:
        raise type(error)(f"Ray job {job_id} may still run ({error}); {way_out}") from error
    if not has_ended:
        said = f"Ray job {job_id} still runs {wait_s:g} s after it was told to stop"
        raise errors.TransientError(f"{said} (`ray job stop --address {jobs.url} {job_id}`); {way_out}")
    _note_end(folder)


def _stop_wait_s(grace_s: float) -> int:
    return math.ceil(grace_s + _KILL_AFTER_S)


def _identity_file(folder: Path) -> Path:
    return folder / "ray_job.json"


def _known(folder: Path) -> dict[str, Any]:  # Any: numbers, texts and a yes or no
    return files.read_json(_identity_file(folder)) if _identity_file(folder).exists() else {}


def _note_end(folder: Path, *, has_ended: bool = True) -> None:
    """Write down whether the known job has ended: its cluster need not be there any more then."""
    known = _known(folder)
    if known and bool(known.get("has_ended")) != has_ended:
        files.write_json(_identity_file(folder), {**known, "has_ended": has_ended})


def _shows(folder: Path, name: str, job_id: str) -> bool:
    try:
        return (folder / "nodes" / name).read_text().strip() == job_id
    except OSError:
        return False
