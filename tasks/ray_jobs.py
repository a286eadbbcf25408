"""Ray's Jobs REST API, as far as a job has to be submitted once, looked at and stopped.

    RayJobs(url) -> ensure(Job) -> find() -> JobState          over lost connections: tasks.ray_follow

Ray itself is not imported: it lives in an environment of its own. A submission id is derived from what is run, so that
a submission whose answer was lost, and one after this process was killed, find the job that is there.

Ring: edge (network).  Units: seconds.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tasks import files
from tasks.environment import read_secret
from tasks.errors import MissingError, RightsError, ServiceError, TokenError, UnavailableError

_ANSWER_S, _HURRIED_S = 30.0, 5.0
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


class RayJobs:
    """A client of one cluster's dashboard. `variables` may hold RAY_AUTH_TOKEN, or its file in RAY_AUTH_TOKEN_PATH."""

    def __init__(self, url: str, variables: Mapping[str, str]) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {token}"} if (token := _read_token(variables)) else {}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=_ANSWER_S, trust_env=False)

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()

    def hurry(self) -> None:
        """Wait less for each answer from here on: a person has cancelled, and we are killed soon."""
        self._client.timeout = httpx.Timeout(_HURRIED_S)

    def version(self) -> str:
        """Return Ray's version. Raises ServiceError when something else answers."""
        try:
            return str(self._ask("GET", "/api/version").json()["ray_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise ServiceError(f"{self.url} is no dashboard of Ray: /api/version answers something else") from error

    def nodes(self) -> list[Node]:
        """Return the living nodes, the head first."""
        reply = self._read("/api/v0/nodes", params={"limit": 10_000, "detail": "true"})
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
            told = self._read(f"/api/jobs/{submission_id}")
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
        """Return all that a job has printed so far, of newer Rays its end (tasks.ray_log)."""
        return str(self._read(f"/api/jobs/{submission_id}/logs").get("logs") or "")

    def stop(self, submission_id: str) -> None:
        """Tell a job to stop: SIGTERM, and after three seconds SIGKILL by Ray."""
        self._ask("POST", f"/api/jobs/{submission_id}/stop")

    def delete(self, submission_id: str) -> None:
        """Forget a job that has ended."""
        self._ask("DELETE", f"/api/jobs/{submission_id}")

    def _read(self, path: str, **more: Any) -> dict[str, Any]:  # Any: httpx's arguments; JSON values
        reply = self._ask("GET", path, **more)
        try:
            return reply.json()
        except ValueError:
            raise UnavailableError(f"GET {self.url}{path}: a page in place of JSON, a proxy's?") from None

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
        may_repeat = method == "GET" or path.endswith("/stop")
        if status in (408, 425, 429, 502, 503, 504) or (status >= 500 and may_repeat):  # its agents come and go
            raise UnavailableError(f"{doing}: {status}")
        raise ServiceError(f"{doing}: {status} {_last_line(reply.text)}")


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


def _read_token(variables: Mapping[str, str]) -> str:
    path = variables.get("RAY_AUTH_TOKEN_PATH", "")
    from_file = {"RAY_AUTH_TOKEN_PATH": Path(path).read_text()} if path and Path(path).is_file() else {}
    return read_secret(
        {"RAY_AUTH_TOKEN": variables.get("RAY_AUTH_TOKEN", ""), **from_file}, "RAY_AUTH_TOKEN", *from_file
    )


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""
