"""Turn trace records into Weave calls.

    TraceRecord -> call() -> one entry of POST /v2/{entity}/{project}/calls/complete

Cost shows in Weave when `summary.usage` is keyed by model, the chat view when `inputs.messages` and
`output.choices` have OpenAI's shape. Times are copied as text: Weave's table is keyed by (project,
started_at, id), and a start that is 1 us off would stay a second row for ever.

Ring: pure.  Units: bytes of JSON.
"""

import json
from typing import Any

from tasks.traces.record import Json, TraceRecord

_CUT_CHARS = 2000
_MAX_DEPTH = 60  # Weave refuses a call that is nested 200 deep, its own levels included
_CACHED = (("cached_tokens", "cache_read_input_tokens"), ("cache_write_tokens", "cache_creation_input_tokens"))
_LINKS = ("weave:///", "weave-trace-internal:///")


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
        "inputs": record.request or {},
        "output": record.response,
        "summary": _summary(record),
        "exception": record.error or (None if record.status == "ok" else record.status),
    }
    value = _storable(value)
    if size_bytes(value) > limit_bytes:
        value |= {name: _cut(value[name]) for name in ("inputs", "output", "exception")}
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
        "duration_ms": record.duration_ms,
        "key_name": record.key_name,
        "upstream": record.upstream,
        "model_digest": record.model_digest,
        "adapter_digest": record.adapter_digest,
        "run_id": record.run_id,
        "sampled": record.sampled,
        "sample_rate": record.sample_rate,
        "redactions": record.redactions,
        "replayed": record.replayed,
    }


def _summary(record: TraceRecord) -> Json:
    failed = record.status != "ok"
    summary: Json = {"status_counts": {"success": int(not failed), "error": int(failed)}}
    if record.usage and record.model:
        counts = {name: count for name, count in record.usage.items() if isinstance(count, int)}
        summary["usage"] = {record.model: {"requests": 1} | _cached(record.usage) | counts}
    return summary


def _cached(usage: Json) -> Json:
    """Return the tokens that a prompt cache held or took, under the names by which Weave prices them.

    Source: `_normalize_openai_cache_tokens` in weave 0.54's OpenAI integration. They stay part of the prompt's tokens.

    >>> _cached({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}})
    {'cache_read_input_tokens': 8}
    """
    found: Json = {}
    for details in (usage.get("prompt_tokens_details"), usage.get("input_tokens_details")):
        for name, known_as in _CACHED:
            count = details.get(name) if isinstance(details, dict) else None
            if isinstance(count, int):
                found.setdefault(known_as, count)
    return found


def _storable(value: Any, depth: int = 0) -> Any:  # Any: walks a JSON value
    """Make of any JSON value one that Weave takes and can give back.

    NaN and infinities, which JSON does not know, become null, and what is nested deeper than Weave
    goes becomes text.
    """
    if isinstance(value, str):
        return _storable_text(value)
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, (dict, list)) and depth == _MAX_DEPTH:
        return _storable_text(_flat(value))
    if isinstance(value, dict):
        return {_storable_text(name): _storable(item, depth + 1) for name, item in value.items()}
    if isinstance(value, list):
        return [_storable(item, depth + 1) for item in value]
    return value


def _storable_text(text: str) -> str:
    """Replace halves of surrogate pairs, and break up what Weave would follow as a link of its own.

    One user's message that is a link into a project of others makes Weave refuse the whole batch,
    and one stored half of a pair makes the project unreadable.

    >>> _storable_text("weave:///team/project/op/f:v1")
    'weave: ///team/project/op/f:v1'
    """
    for link in _LINKS:
        if link in text:
            text = text.replace(link, link.replace(":", ": "))
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _flat(value: Any) -> str:  # Any: a JSON value
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "[nested too deeply to be kept]"


def _cut(value: Any) -> Any:  # Any: walks a JSON value
    if isinstance(value, str) and len(value) > _CUT_CHARS:
        return f"{value[:_CUT_CHARS]} [{len(value) - _CUT_CHARS} more characters]"
    if isinstance(value, dict):
        return {name: _cut(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_cut(item) for item in value]
    return value
