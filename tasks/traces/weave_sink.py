"""Deliver traces to W&B Weave, each of them once.

    records -> POST .../calls/complete -> 200, and only then may the queue forget them

Weave does not refuse a call it already has, so a lost answer must not lead to a second sending:
the outcome is unknown, the sink waits a grace period, asks which ids arrived and sends the rest.
The SDK is not used: its retries make copies and its background sender drops calls.

Ring: edge (network).
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from tasks.errors import AccessError, MissingError, TransientError
from tasks.traces.calls import call
from tasks.traces.queue import QueuedTrace
from tasks.traces.record import Json
from tasks.traces.spec import DrainSpec

_REFUSED = frozenset({400, 413, 422})
_MAX_WAIT_S = 60.0
logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Delivery:
    """What became of one batch: every record is delivered, was there already, or is refused."""

    num_delivered: int = 0
    num_already_there: int = 0
    refused: list[tuple[QueuedTrace, str]] = field(default_factory=list)


class _RefusedError(Exception):
    """Weave will never take this body as it is."""


class _UnknownError(Exception):
    """The request was sent and no usable answer came: the calls may be stored or not."""

    def __init__(self, what: str, wait_s: float = 0.0) -> None:
        super().__init__(what)
        self.wait_s = wait_s


class _BusyError(TransientError):
    """Weave asks to be left alone for longer than a drain waits."""


class WeaveSink:
    """Sends to one Weave project through an httpx client that knows the server and the key."""

    name = "weave"

    def __init__(self, client: httpx.Client, project_id: str, spec: DrainSpec) -> None:
        self._client = client
        self._project_id = project_id
        self._spec = spec
        self.batch_records = spec.batch_records

    def deliver(self, items: Sequence[QueuedTrace]) -> Delivery:
        """Settle a batch. Raises TransientError when Weave is away; asking again later is safe."""
        delivery = Delivery()
        todo = list(items)
        if any(item.redelivered for item in todo):  # a drain died after it may have sent these
            todo = self._missing(todo, delivery)
        groups = self._groups(todo)
        while groups:
            group = groups.pop()
            try:
                self._send(group, delivery)
            except _RefusedError as refusal:
                if len(group) == 1:
                    delivery.refused.append((group[0], str(refusal)))
                else:
                    middle = len(group) // 2
                    groups += [group[middle:], group[:middle]]
        return delivery

    def _groups(self, items: list[QueuedTrace]) -> list[list[QueuedTrace]]:
        """Cut a batch so that no body exceeds `batch_bytes`; the last group is sent first."""
        groups: list[list[QueuedTrace]] = []
        room = 0
        for item in items:
            size = len(item.line)
            if not groups or size > room:
                groups.append([])
                room = self._spec.batch_bytes
            groups[-1].append(item)
            room -= size
        return groups[::-1]

    def _send(self, group: list[QueuedTrace], delivery: Delivery) -> None:
        """Send until the outcome is known. Raises _RefusedError, TransientError, AccessError."""
        for attempt in range(self._spec.attempts):
            try:
                self._post([self._call(item) for item in group])
            except _UnknownError as unknown:
                logger.warning("Weave: %s; asking which of %d calls arrived", unknown, len(group))
                time.sleep(max(0.0, unknown.wait_s - self._spec.grace_s))
                group = self._missing(group, delivery)
            except _BusyError:
                raise
            except TransientError:
                if attempt + 1 == self._spec.attempts:
                    raise
            else:
                delivery.num_delivered += len(group)
                return
            if not group:
                return
        raise TransientError(f"Weave took {self._spec.attempts} requests and no answer was a 200: trying again later")

    def _call(self, item: QueuedTrace) -> Json:
        if item.record is None:
            raise ValueError(f"entry {item.id} has no record: the drain buries those first")
        return call(item.record, self._project_id, self._spec.call_bytes)

    def _post(self, batch: list[Json]) -> None:
        try:
            response = self._client.post(
                f"/v2/{self._project_id}/calls/complete",
                content=json.dumps({"batch": batch}),
                headers={"content-type": "application/json"},
                timeout=self._spec.request_timeout_s,
            )
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            time.sleep(min(1.0, self._spec.grace_s))
            raise TransientError(f"Weave at {self._client.base_url} does not answer: {error}") from error
        except httpx.TransportError as error:
            raise _UnknownError(type(error).__name__) from error
        self._judge(response)

    def _judge(self, response: httpx.Response) -> None:
        status = response.status_code
        if status == 200:
            return
        if status in _REFUSED:
            raise _RefusedError(f"Weave refused it with {status}: {response.text[:300]}")
        if status == 429:
            _wait_as_told(response)
            raise TransientError("Weave answers 429, too many requests: trying again later")
        if status >= 500:
            raise _UnknownError(f"answer {status}", min(_retry_after_s(response, 0.0), _MAX_WAIT_S))
        _raise_for_access(response, self._project_id)

    def _missing(self, items: list[QueuedTrace], delivery: Delivery) -> list[QueuedTrace]:
        """Wait until stragglers arrived, ask what is there, and return the rest."""
        time.sleep(self._spec.grace_s)
        there = self._find([item.record.trace_id for item in items if item.record])
        rest = [item for item in items if not item.record or item.record.trace_id not in there]
        delivery.num_already_there += len(items) - len(rest)
        return rest

    def is_up(self) -> bool:
        """Ask for a call that can't be there: can Weave answer at all? Raises AccessError, MissingError."""
        try:
            self._ask(["00000000-0000-7000-8000-000000000000"])
        except TransientError as error:
            logger.warning("%s", error)
            return False
        return True

    def _find(self, ids: list[str]) -> set[str]:
        """Return which of these calls Weave holds. Raises TransientError when it can't say."""
        for _ in range(self._spec.attempts - 1):
            try:
                return self._ask(ids)
            except _BusyError:
                raise
            except TransientError as error:
                logger.warning("%s", error)
                time.sleep(min(1.0, self._spec.grace_s))
        return self._ask(ids)

    def _ask(self, ids: list[str]) -> set[str]:
        query = {
            "project_id": self._project_id,
            "filter": {"call_ids": ids},
            "columns": ["id"],
            "latest_only": True,
            "limit": len(ids),
        }
        try:
            response = self._client.post("/calls/stream_query", json=query, timeout=self._spec.request_timeout_s)
        except httpx.TransportError as error:
            raise TransientError(f"Weave can't say what arrived ({type(error).__name__}): trying later") from error
        if response.status_code == 200:
            return {json.loads(line)["id"] for line in response.text.splitlines() if line.strip()}
        if response.status_code == 429:
            _wait_as_told(response)
        if response.status_code == 429 or response.status_code >= 500:
            raise TransientError(f"Weave can't say what arrived (answer {response.status_code}): trying later")
        _raise_for_access(response, self._project_id)
        return set()


def _raise_for_access(response: httpx.Response, project_id: str) -> None:
    status = response.status_code
    if status == 401:
        raise AccessError("Weave answers 401: WANDB_API_KEY is wrong or expired; make a new one in the W&B settings")
    if status == 403:
        raise AccessError(f"Weave answers 403: this WANDB_API_KEY may not write to {project_id}; ask its owner")
    if status == 404:
        entity = project_id.partition("/")[0]
        raise MissingError(
            f"Weave answers 404 for {project_id}: check entity and project (WANDB_ENTITY, WANDB_PROJECT or the block), "
            f"create the project at https://wandb.ai/{entity} if it is not there, and check WF_TRACE_SERVER_URL"
        )
    raise AccessError(f"Weave answers {status}: {response.text[:300]}")


def _wait_as_told(response: httpx.Response) -> None:
    """Wait for Retry-After. Raises _BusyError when that is longer than a drain waits."""
    wait_s = _retry_after_s(response, 1.0)
    if wait_s > _MAX_WAIT_S:
        raise _BusyError(f"Weave answers 429 and asks to wait {wait_s:.0f} s: the next drain goes on")
    time.sleep(wait_s)


def _retry_after_s(response: httpx.Response, default_s: float) -> float:
    """Read Retry-After: seconds, or a date."""
    text = response.headers.get("retry-after", "").strip()
    if text.replace(".", "", 1).isdecimal():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return default_s
