"""The trace record: what the gateway writes, the queue keeps and the drain delivers.

    gateway -> TraceRecord -> to_line() -> queue -> from_line() -> calls.py -> Weave or W&B

One record per request, one JSON line per record. The version is in every line: records of older
versions are read with the new fields at their defaults; one from the future is refused, because a
field that is silently dropped (a sampling rate, what was redacted) would make totals wrong.

    version 1   the first
    version 2   key_name, upstream, model_digest, adapter_digest, run_id, sampled, sample_rate,
                redactions, replayed

Ring: pure.  Units: `*_us` microseconds since the epoch (UTC); `*_at` the same as ISO 8601 text
with six digits, which is exact: Weave takes a record whose start differs by 1 us for another one.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Literal, get_args

import orjson

from tasks.errors import CorruptError

VERSION = 2
READABLE = frozenset({1, 2})
Status = Literal["ok", "error", "cancelled", "upstream_error"]
Json = dict[str, Any]  # Any: a request or answer in OpenAI's shape, which grows without us

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECRET_FIELDS = frozenset({"api_key", "authorization", "extra_headers", "headers", "password", "token"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRecord:
    """One request and what became of it.

    `status` is "ok" (answered), "upstream_error" (the model server's own error, passed on),
    "error" (the gateway's), or "cancelled" (the client hung up). `response` is None when nothing
    came back. `stream` counts the chunks of a streamed answer. `sample_rate` is the probability with
    which a record like this one is kept (1.0 for failures), so that 1 / sample_rate is its weight in
    totals; `sampled` says whether the draw chose it. `redactions` counts what was taken out, by kind.
    `replayed` marks a dead letter that a person put back: the sink asks for it before it sends it.
    """

    trace_id: str
    started_at: str
    ended_at: str
    first_token_at: str | None = None
    endpoint: str
    route: str
    reason: str
    model: str | None
    status: Status
    http_status: int
    streamed: bool
    request: Json | None
    response: Json | None = None
    usage: Json | None = None
    error: str | None = None
    stream: Json | None = None
    key_name: str | None = None
    upstream: str | None = None
    model_digest: str | None = None
    adapter_digest: str | None = None
    run_id: str | None = None
    sampled: bool = True
    sample_rate: float = 1.0
    redactions: dict[str, int] | None = None
    replayed: bool = False
    version: int = VERSION

    def to_line(self) -> bytes:
        """Return the record as one line of JSON with its line end."""
        return line_of({name: getattr(self, name) for name in _FIELDS})

    def to_dict(self) -> Json:
        """Return the record as plain values."""
        return asdict(self)

    @property
    def duration_ms(self) -> float:
        """Milliseconds from the first byte of the request to the end of the answer."""
        return (us_from_iso(self.ended_at) - us_from_iso(self.started_at)) / 1000

    @property
    def first_token_ms(self) -> float | None:
        """Milliseconds to the first piece of the answer, or None when none came."""
        if self.first_token_at is None:
            return None
        return (us_from_iso(self.first_token_at) - us_from_iso(self.started_at)) / 1000


_FIELDS = tuple(field.name for field in fields(TraceRecord))
_REQUIRED = ("trace_id", "started_at", "ended_at", "endpoint", "route", "reason", "status", "http_status", "streamed")

_TEXTS = ("trace_id", "endpoint", "route", "reason", "model", "error", "key_name", "upstream")
_OBJECTS = ("request", "response", "usage", "stream", "redactions")


def line_of(record: Json) -> bytes:
    """Return the fields of a record as one line of JSON with its line end.

    Text stays readable UTF-8; half a surrogate pair, legal in JSON but not in UTF-8, is escaped.
    """
    try:
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # half a surrogate pair, or an integer beyond 64 bits
        return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def from_line(line: bytes) -> TraceRecord:
    """Read one line of the queue.

    Fields that this version does not know are dropped. Raises CorruptError for a torn line, a line
    that is no record, and a version from the future.
    """
    value = _parse(line)
    version = value.get("version")
    if version not in READABLE:
        raise CorruptError(
            f"trace record has version {version!r}, this drain reads up to {VERSION}: upgrade Tatara, "
            "then `tatara traces dead replay`"
        )
    missing = [name for name in _REQUIRED if value.get(name) is None]
    if missing:
        raise CorruptError(f"trace record lacks {', '.join(missing)}: it was not written by the gateway")
    if value["status"] not in get_args(Status):
        raise CorruptError(f"trace record has status {value['status']!r}, expected one of {get_args(Status)}")
    try:
        for name in ("started_at", "ended_at"):
            us_from_iso(value[name])
        known: Json = {"model": None, "request": None} | {name: value[name] for name in _FIELDS if name in value}
        record = TraceRecord(**known)
        _check(record)
        return record
    except (TypeError, ValueError) as error:
        raise CorruptError(f"trace record {value['trace_id']!r} does not fit ({error})") from error


def _check(record: TraceRecord) -> None:
    """Refuse here what would stop a sink later. Raises ValueError or TypeError."""
    if record.first_token_at is not None:
        us_from_iso(record.first_token_at)
    if not 0.0 < record.sample_rate <= 1.0:
        raise ValueError(f"sample_rate is {record.sample_rate!r}, expected more than 0 and at most 1")
    for names, kind in ((_TEXTS, str), (_OBJECTS, dict)):
        for name in names:
            value = getattr(record, name)
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} is a {type(value).__name__}, expected {kind.__name__} or null")


def _parse(line: bytes) -> Json:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"a line of {len(line)} bytes is no JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise CorruptError(f"a line of {len(line)} bytes holds a {type(value).__name__}, expected a trace record")
    return value


def iso_from_us(moment_us: int) -> str:
    """Write microseconds since the epoch as UTC text.

    >>> iso_from_us(1_700_000_000_000_007)
    '2023-11-14T22:13:20.000007Z'
    """
    second, micros = divmod(moment_us, 1_000_000)
    return f"{_second_as_text(second)}.{micros:06d}Z"


@lru_cache(maxsize=64)
def _second_as_text(second: int) -> str:
    """Three moments of a request, and those of many requests, share their second: 0.5 us instead of 3."""
    return (_EPOCH + timedelta(seconds=second)).isoformat()[:-6]


def us_from_iso(text: str) -> int:
    """Read what `iso_from_us` wrote; exact, no floating point on the way.

    >>> us_from_iso(iso_from_us(1_700_000_000_000_007))
    1700000000000007
    """
    return (datetime.fromisoformat(text) - _EPOCH) // timedelta(microseconds=1)


def uuid7(moment_us: int, entropy: int) -> str:
    """Make a UUID of version 7 that sorts by time to about a microsecond.

    Args:
        moment_us: the time, microseconds since the epoch.
        entropy: at least 62 random bits.
    Source: RFC 9562, section 5.7 with the sub-millisecond fraction of section 6.2, method 3.

    >>> uuid7(1_700_000_000_000_500, 0)
    '018bcfe5-6800-7800-8000-000000000000'
    """
    millis, micros = divmod(moment_us, 1000)
    high, low = 2 << 14 | entropy >> 48 & 0x3FFF, entropy & (1 << 48) - 1
    millis &= (1 << 48) - 1
    return f"{millis >> 16:08x}-{millis & 0xFFFF:04x}-7{micros * 4096 // 1000:03x}-{high:04x}-{low:012x}"


def is_sampled(trace_id: str, rate: float) -> bool:
    """Decide by the id alone whether a trace is kept: every process and every later look says the same.

    >>> is_sampled("018bcfe5-6800-7800-8000-000000000000", 1.0), is_sampled("x", 0.0)
    (True, False)
    """
    return rate >= 1.0 or zlib.crc32(trace_id.encode()) < rate * 2**32


def as_replayed(line: bytes) -> bytes:
    """Mark a line of the queue as put back by a person. Raises CorruptError when it is no JSON object."""
    return line_of(_parse(line) | {"replayed": True})


def without_secrets(request: Mapping[str, Any]) -> Json:
    """Copy a request body without the top-level fields in which clients put credentials.

    >>> without_secrets({"model": "m", "api_key": "k"})
    {'model': 'm'}
    """
    return {name: value for name, value in request.items() if name.lower() not in _SECRET_FIELDS}


def usage_of(response: Json | None) -> Json | None:
    """Return the token counts of an answer: its `usage` when that is an object, else None."""
    usage = response.get("usage") if response else None
    return usage if isinstance(usage, dict) else None
