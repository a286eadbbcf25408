import json
import uuid

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.errors import CorruptError
from tasks.traces.record import (
    TraceRecord,
    as_replayed,
    from_line,
    is_sampled,
    iso_from_us,
    us_from_iso,
    uuid7,
    without_secrets,
)

steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # two shared cores
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@steady
@given(st.dictionaries(st.text(st.characters(), max_size=5), values, max_size=4), st.text(st.characters()))
def test_any_record_survives_its_line(body, error):
    record = TraceRecord(
        trace_id="t",
        started_at=iso_from_us(1),
        ended_at=iso_from_us(2),
        endpoint="/v1/x",
        route="vllm",
        reason="r",
        model=None,
        status="error",
        http_status=500,
        streamed=False,
        request=body,
        error=error,
    )
    line = record.to_line()
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert from_line(line) == record


def test_half_a_surrogate_pair_does_not_stop_a_record(make_record):
    record = make_record(1, request={"text": "\ud800"})
    assert from_line(record.to_line()) == record


def test_text_is_readable_in_the_file(make_record):
    assert "質問 7" in make_record(7).to_line().decode()


@steady
@given(st.integers(0, 4_000_000_000_000_000))
def test_times_are_exact_to_the_microsecond(moment_us):
    assert us_from_iso(iso_from_us(moment_us)) == moment_us


@steady
@given(st.integers(0, 4_000_000_000_000_000), st.integers(0, (1 << 62) - 1), st.integers(1, 10_000_000))
def test_uuid7_is_valid_and_sorts_by_time(moment_us, entropy, later_us):
    text = uuid7(moment_us, entropy)
    parsed = uuid.UUID(text)
    assert (parsed.version, parsed.variant, str(parsed)) == (7, uuid.RFC_4122, text)
    assert uuid7(moment_us + later_us, 0) > text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "version 3, this drain reads up to 2"),
        ({"version": None}, "version None"),
        ({"status": "fine"}, "status 'fine'"),
        ({"trace_id": None}, "lacks trace_id"),
        ({"started_at": "yesterday"}, "does not fit"),
        ({"started_at": "2026-01-01T00:00:00"}, "does not fit"),
        ({"first_token_at": "soon"}, "does not fit"),
        ({"sample_rate": 0}, "sample_rate is 0, expected more than 0"),
        ({"usage": [3]}, "usage is a list, expected dict or null"),
        ({"model": 7}, "model is a int, expected str or null"),
    ],
)
def test_a_line_that_is_no_record_says_why(make_record, change, message):
    line = json.dumps(make_record(1).to_dict() | change).encode()
    with pytest.raises(CorruptError, match=message):
        from_line(line)


@pytest.mark.parametrize("line", [b"", b"{", b"[1]", b"\xff\xfe", b"{" * 100_000])
def test_a_torn_line_is_a_corrupt_error(line):
    with pytest.raises(CorruptError):
        from_line(line)


def test_fields_that_are_not_known_are_dropped(make_record):
    line = json.dumps(make_record(1).to_dict() | {"of_tomorrow": "team-a"}).encode()
    assert from_line(line) == make_record(1)


def test_a_line_of_version_1_is_read_with_the_new_fields_at_their_defaults(make_record):
    new = {"key_name", "upstream", "model_digest", "adapter_digest", "run_id", "sampled", "sample_rate"}
    new |= {"redactions", "replayed"}
    old = {name: value for name, value in make_record(1).to_dict().items() if name not in new} | {"version": 1}
    assert from_line(json.dumps(old).encode()) == make_record(1, version=1)


def test_a_line_can_be_marked_as_replayed(make_record):
    line = make_record(1).to_line()
    assert from_line(as_replayed(line)) == make_record(1, replayed=True)
    with pytest.raises(CorruptError, match="is no JSON"):
        as_replayed(b"{")


@steady
@given(st.floats(0.0, 1.0))
def test_sampling_is_decided_by_the_id_and_keeps_the_share(rate):
    ids = [uuid7(1_800_000_000_000_000 + n * 977, n * 2_654_435_761) for n in range(2000)]
    kept = [is_sampled(trace_id, rate) for trace_id in ids]
    assert kept == [is_sampled(trace_id, rate) for trace_id in ids]
    assert abs(sum(kept) / len(ids) - rate) < 0.06
    assert all(is_sampled(trace_id, 1.0) for trace_id, keep in zip(ids, kept, strict=True) if keep)


def test_measures_and_secrets(make_record):
    record = make_record(1)
    assert (record.duration_ms, record.first_token_ms) == (2.5, 1.5)
    assert make_record(1, first_token_at=None).first_token_ms is None
    assert without_secrets({"model": "m", "Authorization": "x", "api_key": "y"}) == {"model": "m"}
