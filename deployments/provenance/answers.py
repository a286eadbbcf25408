"""The trace of an answer, wherever it is by now.

    JSONL queue and its sealed segments, dead letters, Redis, W&B offline runs, Weave -> Trace

The places are asked in this order, the network last; what was looked at is told when nothing is found.

Ring: edge (disk, network).
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tasks import files
from tasks.errors import AccessError, CorruptError, TataraError, TransientError
from tasks.traces.dead_letters import FileDeadLetters, RedisDeadLetters
from tasks.traces.record import from_line
from tasks.traces.redis_stream import STREAM, RedisQueue
from tasks.traces.run import connect_redis, queue_path
from tasks.traces.segments import sealed_segments

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
_ANSWER = re.compile(r"(chatcmpl|cmpl|resp)[-_]")
_TIMEOUT_S = 30.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What is known of one answer. Digests and run id are empty when the gateway was not told them."""

    trace_id: str
    place: str
    started_at: str
    route: str
    model: str
    status: str
    model_digest: str
    adapter_digest: str
    run_id: str


def looks_like_answer(text: str) -> bool:
    """Say whether an id is one of the gateway's (x-request-id) or of an answer's body (chatcmpl-...)."""
    return bool(_UUID.fullmatch(text) or _ANSWER.match(text))


def find_trace(wanted: str, home: Path, variables: Mapping[str, str]) -> tuple[Trace | None, list[str]]:
    """Return the trace of an answer and the places that were looked at.

    `wanted` is the x-request-id, or the id in the answer's body, into which vLLM writes the x-request-id.
    """
    looked: list[str] = []
    found = _UUID.search(wanted)
    trace_id = found[0].lower() if found else wanted
    for name, place in _places(home, variables):
        try:
            trace = place(trace_id)
            looked.append(name)
        except (TataraError, OSError) as error:
            looked.append(f"{name} (could not be asked: {error})")
            continue
        if trace:
            return trace, looked
    return None, looked


def _places(home: Path, variables: Mapping[str, str]) -> Iterator[tuple[str, Any]]:  # Any: trace id -> Trace | None
    queue = queue_path(variables)
    yield f"the queue {queue} and its segments", lambda id: _in_files(queue, id)
    yield f"its dead letters {queue}.dead", lambda id: _in_letters(FileDeadLetters(queue), id)
    if client := connect_redis(variables):
        yield f"the Redis stream {STREAM}", lambda id: _in_redis(client, id)
        yield "the Redis stream's dead letters", lambda id: _in_letters(RedisDeadLetters(client, STREAM), id)
    yield f"the W&B offline runs below {home / 'traces'}", lambda id: _in_offline_runs(home / "traces", id)
    key, entity = variables.get("WANDB_API_KEY"), variables.get("WANDB_ENTITY")
    if key and entity:
        project = f"{entity}/{variables.get('WANDB_PROJECT') or 'tatara'}"
        server = variables.get("WF_TRACE_SERVER_URL") or "https://trace.wandb.ai"
        yield f"Weave, project {project}", lambda id: _in_weave(server, key, project, id)


def _in_files(queue: Path, trace_id: str) -> Trace | None:
    """Look at what is acknowledged too: a segment stays until its last record is."""
    if not queue.parent.is_dir():
        return None
    for path in (queue, *sealed_segments(queue).values()):
        if path.is_file() and (trace := _in_lines(path, trace_id)):
            return trace
    return None


def _in_lines(path: Path, trace_id: str) -> Trace | None:
    needle = trace_id.encode()
    with path.open("rb") as lines:
        for line in lines:
            if needle in line and (trace := _of_line(line, trace_id, str(path))):
                return trace
    return None


def _in_letters(letters: FileDeadLetters | RedisDeadLetters, trace_id: str) -> Trace | None:
    found = (_of_line(letter.line, trace_id, "dead letters") for letter in letters.letters())
    return next((trace for trace in found if trace), None)


def _in_redis(client: Any, trace_id: str) -> Trace | None:  # Any: redis.Redis
    found = (_of_line(item.line, trace_id, f"Redis stream {STREAM}") for item in RedisQueue(client).peek())
    return next((trace for trace in found if trace), None)


def _of_line(line: bytes, trace_id: str, place: str) -> Trace | None:
    try:
        record = from_line(line)
    except CorruptError:
        return None
    answer_id = (record.response or {}).get("id")
    if trace_id not in (record.trace_id, answer_id):
        return None
    return _trace(record.to_dict(), place)


def _in_offline_runs(folder: Path, trace_id: str) -> Trace | None:
    """Read the table that each run keeps as JSON beside its log: wandb itself is not needed."""
    for marker in sorted((folder / "wandb").glob("offline-run-*/delivered.json")):
        if trace_id not in files.read_json(marker):
            continue
        for path in marker.parent.rglob("*.table.json"):
            table = files.read_json(path)
            for row in table["data"]:
                values = dict(zip(table["columns"], row, strict=True))
                if values.get("trace_id") == trace_id:
                    return _trace(values, str(marker.parent))
    return None


def _in_weave(server: str, key: str, project: str, trace_id: str) -> Trace | None:
    query = {
        "project_id": project,
        "filter": {"call_ids": [trace_id]},
        "columns": ["id", "started_at", "attributes", "inputs"],
        "latest_only": True,
        "limit": 1,
    }
    try:
        reply = httpx.post(f"{server}/calls/stream_query", json=query, auth=("api", key), timeout=_TIMEOUT_S)
    except httpx.TransportError as error:
        raise TransientError(f"Weave at {server} does not answer: {type(error).__name__}") from error
    if reply.status_code in (401, 403):
        raise AccessError(f"Weave answers {reply.status_code}: this WANDB_API_KEY may not read {project}")
    if reply.status_code != 200:
        raise TransientError(f"Weave answers {reply.status_code}: {reply.text[:200]}")
    for line in reply.text.splitlines():
        if line.strip():
            call = json.loads(line)
            told = (call.get("attributes") or {}).get("tatara") or {}
            model = (call.get("inputs") or {}).get("model")
            values = {**told, "trace_id": call["id"], "started_at": call.get("started_at"), "model": model}
            return _trace(values, f"Weave, project {project}")
    return None


def _trace(values: Mapping[str, Any], place: str) -> Trace:  # Any: JSON values
    names = ("trace_id", "started_at", "route", "model", "status", "model_digest", "adapter_digest", "run_id")
    return Trace(place=place, **{name: str(values.get(name) or "") for name in names})
