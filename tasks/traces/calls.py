"""Turn trace records into Weave calls.

    TraceRecord -> call() -> one entry of POST /v2/{entity}/{project}/calls/complete

Cost shows in Weave when `summary.usage` is keyed by model, the chat view when `inputs.messages` and
`output.choices` have OpenAI's shape. Times are copied as text: Weave's table is keyed by (project,
started_at, id), and a start that is 1 us off would stay a second row for ever.

Ring: pure.  Units: bytes of JSON.
"""

import json
from typing import Any

from tasks.traces.record import Json, TraceRecord, us_from_iso

_CUT_CHARS = 2000


def call(record: TraceRecord, project_id: str, limit_bytes: int) -> Json:
    """Build the call of one record; long texts are cut when it would exceed `limit_bytes`."""
    value: Json = {
        "project_id": project_id,
        "id": record.trace_id,
        "trace_id": record.trace_id,
        "op_name": f"gateway{record.endpoint.replace('/v1', '').replace('/', '.')}",
        "display_name": f"{record.endpoint} {record.status}",
        "started_at": record.started_at,
        "ended_at": record.ended_at,
        "attributes": {"tatara": _attributes(record)},
        "inputs": _without_nan(record.request or {}),
        "output": _without_nan(record.response),
        "summary": _summary(record),
        "exception": record.error,
    }
    if size_bytes(value) > limit_bytes:
        value["inputs"], value["output"] = _cut(value["inputs"]), _cut(value["output"])
        value["attributes"]["tatara"]["cut_to_chars"] = _CUT_CHARS
    return value


def size_bytes(value: Json) -> int:
    """Return how many bytes `value` takes as JSON on the wire."""
    return len(json.dumps(value))


def _attributes(record: TraceRecord) -> Json:
    return {
        "route": record.route,
        "reason": record.reason,
        "status": record.status,
        "http_status": record.http_status,
        "streamed": record.streamed,
        "stream": record.stream,
        "first_token_at": record.first_token_at,
        "first_token_ms": record.first_token_ms,
        "duration_ms": (us_from_iso(record.ended_at) - us_from_iso(record.started_at)) / 1000,
    }


def _summary(record: TraceRecord) -> Json:
    failed = record.status != "ok"
    summary: Json = {"status_counts": {"success": int(not failed), "error": int(failed)}}
    if record.usage and record.model:
        counts = {name: count for name, count in record.usage.items() if isinstance(count, int)}
        summary["usage"] = {record.model: {"requests": 1} | counts}
    return summary


def _without_nan(value: Any) -> Any:  # Any: walks a JSON value
    """Replace NaN and infinities, which Python reads and writes but JSON does not know, by null."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return value


def _cut(value: Any) -> Any:  # Any: walks a JSON value
    if isinstance(value, str) and len(value) > _CUT_CHARS:
        return f"{value[:_CUT_CHARS]} [{len(value) - _CUT_CHARS} more characters]"
    if isinstance(value, dict):
        return {name: _cut(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_cut(item) for item in value]
    return value
