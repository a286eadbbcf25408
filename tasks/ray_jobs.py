"""Ray's Jobs REST API, as far as a job has to be submitted once, followed over lost connections, and stopped.

    RayJobs(url) -> ensure(Job) -> follow() -> JobState

Ray itself is not imported: it lives in an environment of its own. A submission id is derived from what is run, so that
a submission whose answer was lost, and one after this process was killed, find the job that is there.

Ring: edge (network).  Units: seconds; offsets are characters of a job's log.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tasks import files
from tasks.environment import read_secret
from tasks.errors import (
    MissingError,
    RightsError,
    ServiceError,
    TataraError,
    TokenError,
    TransientError,
    UnavailableError,
)

_ANSWER_S = 30.0
_LOG_CHARS_PER_S = 1 << 20  # the API tells a log only as a whole: a long one is asked for less often
_LONGEST_WAIT_S = 30.0
DONE = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be run on a cluster. Everything here can be read on Ray's dashboard: no secrets."""

    submission_id: str
    entrypoint: str
    env_vars: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """What the cluster says of a job. `exit_code` is the entrypoint's, None where Ray knows none."""

    status: str
    message: str = ""
    exit_code: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.status in DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One living node of a cluster."""

    node_id: str
    address: str
    is_head: bool
    resources: Mapping[str, float]

    def count(self, resource: str) -> int:
        """How many of a resource (CPU, GPU) it has."""
        return int(self.resources.get(resource, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How a job is followed. `lost_after_s` is how long a dashboard may be away."""

    poll_s: float = 2.0
    health_s: float = 30.0
    lost_after_s: float = 900.0


class RayJobs:
    """A client of one cluster's dashboard. `variables` may hold RAY_AUTH_TOKEN, or its file in RAY_AUTH_TOKEN_PATH."""

    def __init__(self, url: str, variables: Mapping[str, str]) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {token}"} if (token := _read_token(variables)) else {}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=_ANSWER_S, trust_env=False)

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()

    def version(self) -> str:
        """Return Ray's version. Raises ServiceError when something else answers."""
        try:
            return str(self._ask("GET", "/api/version").json()["ray_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise ServiceError(f"{self.url} is no dashboard of Ray: /api/version answers something else") from error

    def nodes(self) -> list[Node]:
        """Return the living nodes, the head first."""
        reply = self._ask("GET", "/api/v0/nodes", params={"limit": 10_000, "detail": "true"}).json()
        found = [
            Node(
                node_id=row["node_id"],
                address=row["node_ip"],
                is_head=bool(row.get("is_head_node")),
                resources=row.get("resources_total") or {},
            )
            for row in reply["data"]["result"]["result"]
            if row["state"] == "ALIVE"
        ]
        return sorted(found, key=lambda node: (not node.is_head, node.address, node.node_id))

    def find(self, submission_id: str) -> JobState | None:
        """Return what the cluster knows of a job, None when it knows none."""
        try:
            told = self._ask("GET", f"/api/jobs/{submission_id}").json()
        except MissingError:
            return None
        return JobState(
            status=told["status"],
            message=told.get("message") or "",
            exit_code=told.get("driver_exit_code"),
            metadata=told.get("metadata") or {},
        )

    def ensure(self, job: Job) -> JobState:
        """Submit a job unless one of its id is there; return its state.

        Called again after a TransientError it never submits twice: Ray refuses a second one of the same id.
        """
        found = self.find(job.submission_id)
        if found is None:
            body = {
                "entrypoint": job.entrypoint,
                "submission_id": job.submission_id,
                "runtime_env": {"env_vars": dict(job.env_vars)},
                "metadata": dict(job.metadata),
            }
            try:
                self._ask("POST", "/api/jobs/", json=body)
            except ServiceError as error:
                if "already exists" not in str(error):
                    raise
            found = self.find(job.submission_id) or JobState(status="PENDING")
        return found

    def logs(self, submission_id: str) -> str:
        """Return all that a job has printed so far."""
        return str(self._ask("GET", f"/api/jobs/{submission_id}/logs").json().get("logs") or "")

    def stop(self, submission_id: str) -> None:
        """Tell a job to stop: SIGTERM, and after three seconds SIGKILL by Ray."""
        self._ask("POST", f"/api/jobs/{submission_id}/stop")

    def delete(self, submission_id: str) -> None:
        """Forget a job that has ended."""
        self._ask("DELETE", f"/api/jobs/{submission_id}")

    def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:  # Any: httpx's arguments
        doing = f"{method} {self.url}{path}"
        try:
            reply = self._client.request(method, path, **more)
        except httpx.TransportError as error:
            raise UnavailableError(f"{doing}: {type(error).__name__} {error}".rstrip()) from None
        status = reply.status_code
        if status < 300:
            return reply
        if status == 404:
            raise MissingError(f"{doing}: 404")
        if status == 401:
            raise TokenError(
                f"{doing}: 401, the cluster asks for a token: set RAY_AUTH_TOKEN in the worker's environment"
            )
        if status == 403:
            raise RightsError(f"{doing}: 403, the token in RAY_AUTH_TOKEN is not this cluster's")
        if status in (408, 425, 429, 502, 503, 504) or (status >= 500 and method == "GET"):  # its agents come and go
            raise UnavailableError(f"{doing}: {status}")
        raise ServiceError(f"{doing}: {status} {_last_line(reply.text)}")


def follow(
    jobs: RayJobs,
    submission_id: str,
    patience: Patience,
    on_line: Callable[[str], None],
    on_health: Callable[[list[Node]], None],
) -> JobState:
    """Tell a job's lines from its first one until it ends; return how.

    A dashboard that is away is asked again, less and less often, and said once when it goes and when it is back.
    Raises: TransientError when it is away for `lost_after_s`, or is back and knows no such job. The job is left alone.
    """
    told, lost_since, wait_s, looked = 0, 0.0, patience.poll_s, float("-inf")
    while True:
        try:
            state = jobs.find(submission_id)  # before the log: what an ended job printed is all there
            text = jobs.logs(submission_id) if state else ""
            if time.monotonic() - looked > patience.health_s:
                looked = time.monotonic()
                on_health(jobs.nodes())
        except (UnavailableError, ValueError) as error:  # the second: a proxy's page in place of JSON
            now = time.monotonic()
            lost_since = lost_since or now
            if wait_s == patience.poll_s:
                logger.warning(
                    "the cluster does not answer (%s): job %s goes on there, asking again", error, submission_id
                )
            if now - lost_since > patience.lost_after_s:
                raise TransientError(
                    f"{jobs.url} did not answer for {now - lost_since:.0f} s ({error}); job {submission_id} was left "
                    "alone: the next run follows it"
                ) from error
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            time.sleep(wait_s)
            continue
        if lost_since:
            logger.info("the cluster answers again after %.0f s", time.monotonic() - lost_since)
            lost_since = 0.0
        if state is None:
            raise TransientError(f"{jobs.url} knows no job {submission_id} any more: the cluster was started anew")
        told = _tell(text, told, on_line, is_whole=state.is_done)
        if state.is_done:
            return state
        wait_s = patience.poll_s
        time.sleep(max(wait_s, len(text) / _LOG_CHARS_PER_S))


def choose_attempt(jobs: RayJobs, name: str, path: Path, **more: str) -> int:
    """Return the number of the job `name-number` to follow or to submit: a new one when the last failed or is unknown.

    It is written down in `path`, with `more`, before the submission: a kill in between is followed and not doubled.
    """
    last: dict[str, Any] = files.read_json(path) if path.exists() else {"attempt": 0}  # Any: numbers and texts
    number = int(last["attempt"])
    if number and (state := find_live(jobs, last["submission_id"])):
        logger.info("job %s is there (%s): following it", last["submission_id"], state.status)
        return number
    told = {"attempt": number + 1, "submission_id": f"{name}-{number + 1}", "url": jobs.url, **more}
    files.write_json(path, told)
    return number + 1


def find_live(jobs: RayJobs, submission_id: str) -> JobState | None:
    """Return the state of a job that runs, waits, or has done what it was to do; None for every other."""
    state = jobs.find(submission_id)
    return state if state and (not state.is_done or state.status == "SUCCEEDED") else None


def submit(jobs: RayJobs, job: Job, patience: Patience) -> None:
    """Submit a job once, however often the answer is lost. Raises TransientError after `lost_after_s`."""
    deadline = time.monotonic() + patience.lost_after_s
    while True:
        try:
            state = jobs.ensure(job)
            logger.info("job %s on %s: %s", job.submission_id, jobs.url, state.status)
            return
        except TransientError:
            if time.monotonic() > deadline:
                raise
            time.sleep(patience.poll_s)


def stop_job(jobs: RayJobs, submission_id: str, patience_s: float) -> None:
    """Stop a job and wait until it has; a cluster that does not answer is told of in the log."""
    deadline = time.monotonic() + patience_s
    try:
        jobs.stop(submission_id)
        while (state := jobs.find(submission_id)) and not state.is_done:
            if time.monotonic() > deadline:
                logger.warning("job %s still runs %g s after it was told to stop", submission_id, patience_s)
                return
            time.sleep(0.2)
        logger.info("job %s was stopped", submission_id)
    except TataraError as error:
        logger.warning("job %s could not be stopped: %s", submission_id, error)


class Health:
    """Whether nodes of the cluster were lost: said at once, and once, with what it means."""

    def __init__(self, meaning: str) -> None:
        self._meaning = meaning
        self.lost: dict[str, str] = {}
        self._known: dict[str, str] = {}

    def __call__(self, nodes: list[Node]) -> None:
        """Take what lives now."""
        alive = {node.node_id: node.address for node in nodes}
        for node_id in self._known.keys() - alive.keys():
            self.lost[node_id] = self._known[node_id]
            logger.error(
                "node %s (%s) of the cluster is lost, %d are left: %s",
                *(self._known[node_id], node_id[:8], len(alive), self._meaning),
            )
        self._known = alive


def last_lines(text: str, count: int = 30) -> str:
    """Return the end of a log for an error message."""
    return "\n".join(text.splitlines()[-count:]) or "(no output)"


def _tell(text: str, told: int, on_line: Callable[[str], None], *, is_whole: bool) -> int:
    """Hand on the whole lines behind offset `told`; return the offset behind them. A torn last line waits."""
    end = len(text) if is_whole else text.rfind("\n") + 1
    for line in text[told:end].splitlines():
        on_line(line)
    return max(told, end)


def _read_token(variables: Mapping[str, str]) -> str:
    path = variables.get("RAY_AUTH_TOKEN_PATH", "")
    from_file = {"RAY_AUTH_TOKEN_PATH": Path(path).read_text()} if path and Path(path).is_file() else {}
    return read_secret(
        {"RAY_AUTH_TOKEN": variables.get("RAY_AUTH_TOKEN", ""), **from_file}, "RAY_AUTH_TOKEN", *from_file
    )


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""
