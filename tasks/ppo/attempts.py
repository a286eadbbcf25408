"""Where the job of a run is: written down before it is submitted, found again by a later run of the same question.

    attempt.json = {"attempt", "submission_id", "url", "python"}        url: of the cluster's dashboard, or "local"

A worker that was started again may name another cluster, or none; the job that it left is on the one that it named.

Ring: edge.  Units: seconds.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks import files, ray_jobs
from tasks.errors import CorruptError, TransientError
from tasks.ppo.cluster import LOCAL, Cluster, local_jobs, stop_locally
from tasks.ray_follow import Patience, ask_patiently
from tasks.ray_jobs import RayJobs, find_live
from tasks.specs import RaySpec

ATTEMPT = "attempt.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One submission of the trainer's job, where, and with which Python on the nodes."""

    attempt: int
    submission_id: str
    url: str = ""  # empty in a record that is older than this field
    python: str = ""


def read_attempt(folder: Path) -> Attempt | None:
    """Return the newest attempt, None before the first."""
    try:
        return Attempt(**files.read_json(folder / ATTEMPT))
    except (FileNotFoundError, CorruptError, TypeError):
        return None


def choose_attempt(cluster: Cluster, key: str, folder: Path) -> Attempt:
    """Return the job to follow or to submit: a new one when the last one failed or is not known to this cluster."""
    where = {"url": LOCAL} if cluster.is_ours else {}
    path = folder / ATTEMPT
    ray_jobs.choose_attempt(cluster.jobs, f"tatara-ppo-{key[:16]}", path, **where, python=cluster.python)
    return Attempt(**files.read_json(path))


def is_there(jobs: RayJobs, folder: Path) -> bool:
    """Say whether this cluster has a job of the run that is to be followed."""
    last = read_attempt(folder)
    return last is not None and find_live(jobs, last.submission_id) is not None


def find_job(folder: Path, variables: Mapping[str, str]) -> Attempt | None:
    """Return the attempt whose job is on the cluster that it was submitted to; None when there is none any more.

    Raises: UnavailableError when that cluster does not answer; TokenError, RightsError.
    """
    attempt = read_attempt(folder)
    if attempt is None or not attempt.url:
        return None
    jobs = local_jobs(folder) if attempt.url == LOCAL else RayJobs(attempt.url, variables)
    if jobs is None:  # the cluster that was started here is gone, and its job with it
        return None
    try:
        return attempt if find_live(jobs, attempt.submission_id) else None
    finally:
        jobs.close()


def follow_where(folder: Path, ray: RaySpec, variables: Mapping[str, str]) -> RaySpec:
    """Return `ray` with the address of the cluster where a job of this run is; as it was without such a job.

    A cluster that does not answer and is not the one that is named now is asked for `lost_after_s`: two jobs would
    write the same checkpoints. Then its job counts as lost with it.
    """
    attempt, named = read_attempt(folder), named_address(ray, variables)
    if attempt is None or not attempt.url or attempt.url == named:
        return ray
    found = _ask_patiently(folder, attempt, ray, variables)
    if found is None:
        if attempt.url == LOCAL:
            stop_locally(folder)
        return ray
    logger.warning(
        "job %s was submitted to %s and is there: it is followed there%s",
        *(found.submission_id, found.url, f", not on {named}, which is named now" if named else ""),
    )
    return ray.model_copy(update={"address": found.url, "python": found.python or ray.python})


def named_address(ray: RaySpec, variables: Mapping[str, str]) -> str:
    """Return what recipe and environment name, empty for nothing."""
    return (ray.address or variables.get("RAY_ADDRESS", "")).rstrip("/")


def _ask_patiently(folder: Path, attempt: Attempt, ray: RaySpec, variables: Mapping[str, str]) -> Attempt | None:
    def say(error: TransientError) -> None:
        logger.warning(
            "job %s was submitted to %s, which does not answer (%s): asking again for %g s, since two jobs "
            "would write the same checkpoints. If that cluster is gone, remove %s and run this again",
            *(attempt.submission_id, attempt.url, error, ray.lost_after_s, folder / ATTEMPT),
        )

    patience = Patience(poll_s=ray.poll_s, lost_after_s=ray.lost_after_s)
    try:
        return ask_patiently(lambda: find_job(folder, variables), patience, say)
    except TransientError:
        logger.warning(
            "%s did not answer for %g s: job %s counts as lost with it, and the next one goes on from its newest "
            "checkpoint",
            *(attempt.url, ray.lost_after_s, attempt.submission_id),
        )
        return None
