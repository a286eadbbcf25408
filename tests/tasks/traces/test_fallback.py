"""Weave down: wait, or W&B offline runs; a trace is in one of the two, never in both."""

import email.utils
import json
import time
from datetime import UTC, datetime

import httpx
import pytest

from tasks.errors import AccessError, CapacityError, TransientError
from tasks.traces.fallback import FallbackSink
from tasks.traces.run import drain_traces, queue_lag, sink_from_environment
from tasks.traces.spec import DrainSpec, failure_markdown
from tasks.traces.wandb_sink import DELIVERED, WandbOfflineSink
from tasks.traces.weave_sink import WeaveSink

SPEC = DrainSpec(batch_records=5, grace_s=0.0, request_timeout_s=2.0, attempts=2, fallback="wandb-offline")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    yield WandbOfflineSink(tmp_path / "runs", "tatara")
    wandb.teardown()


def weave_sink(url):
    return WeaveSink(httpx.Client(base_url=url, auth=("api", "key")), "team/tatara", SPEC)


def fill(queue, make_record, first, last):
    queue.append(make_record(n).to_line() for n in range(first, last))
    return sorted(make_record(n).trace_id for n in range(first, last))


def in_offline_runs(sink):
    markers = [marker for run in sink._runs() for marker in run.glob(DELIVERED)]
    return sorted(name for marker in markers for name in json.loads(marker.read_text()))


def test_while_weave_is_down_traces_go_offline_and_only_there(queue, weave, offline, make_record, free):
    nobody = FallbackSink(weave_sink(f"http://127.0.0.1:{free()}"), offline)
    first = fill(queue, make_record, 0, 12)
    report = drain_traces(queue, nobody, SPEC)
    assert (report.sink, report.num_delivered, report.num_waiting) == ("wandb-offline", 12, 0)
    second = fill(queue, make_record, 12, 20)
    back = FallbackSink(weave_sink(weave.url), offline)
    report = drain_traces(queue, back, SPEC)
    assert (report.sink, report.num_delivered) == ("weave", 8)
    assert in_offline_runs(offline) == first
    assert sorted(row["id"] for row in weave.rows()) == second


def test_what_was_written_offline_before_a_kill_is_not_sent_to_weave(queue, weave, offline, make_record):
    first = fill(queue, make_record, 0, 5)
    assert queue.lock()
    items = queue.read(5)
    queue.intend(items)
    offline.deliver(items)
    queue.close()  # killed before the acknowledgement
    report = drain_traces(queue, FallbackSink(weave_sink(weave.url), offline), SPEC)
    assert (report.num_delivered, report.num_already_there) == (0, 5)
    assert weave.rows() == []
    assert in_offline_runs(offline) == first


def test_what_may_be_in_weave_waits_for_weave(queue, weave, offline, make_record, free):
    expected = fill(queue, make_record, 0, 5)
    weave.misbehave(next=["503-stored"], query=["503", "503", "503"])
    with pytest.raises(TransientError):  # stored, but it can't say so
        drain_traces(queue, weave_sink(weave.url), SPEC)
    nobody = FallbackSink(weave_sink(f"http://127.0.0.1:{free()}"), offline)
    with pytest.raises(TransientError, match="5 traces may be there already"):
        drain_traces(queue, nobody, SPEC)
    weave.misbehave(query=[])
    report = drain_traces(queue, FallbackSink(weave_sink(weave.url), offline), SPEC)
    assert (report.num_already_there, report.num_delivered) == (5, 0)
    assert sorted(row["id"] for row in weave.rows()) == expected
    assert in_offline_runs(offline) == []


def test_waiting_is_the_default_and_the_environment_may_choose(queue, make_record, free):
    environment = {"WANDB_API_KEY": "k", "WANDB_ENTITY": "e", "WF_TRACE_SERVER_URL": f"http://127.0.0.1:{free()}"}
    assert isinstance(sink_from_environment(SPEC, environment), FallbackSink)
    spec = DrainSpec(grace_s=0.0, attempts=1)
    fill(queue, make_record, 0, 3)
    with pytest.raises(TransientError) as error:
        drain_traces(queue, sink_from_environment(spec, environment), spec)
    text = failure_markdown(error.value, queue_lag(queue), datetime(2027, 1, 15, 8, 1, tzinfo=UTC))
    assert "| still waiting | 3 |" in text
    assert "| lag, seconds | 60.0 |" in text
    assert "| before it failed | 0 records settled in" in text
    assert "the queue keeps every record" in text


def test_a_failure_says_what_to_do():
    now = datetime(2027, 1, 15, tzinfo=UTC)
    assert "Correct the key" in failure_markdown(AccessError("401"), (3, None), now)
    assert "| still waiting | unknown |" in failure_markdown(CapacityError("a|b\nc"), None, now)
    assert "a\\|b c" in failure_markdown(CapacityError("a|b\nc"), None, now)
    assert "Read the log" in failure_markdown(RuntimeError("x"), None, now)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for_in_both_forms(queue, weave, make_record, form):
    fill(queue, make_record, 0, 5)
    told = "1"
    if form == "date":
        told = email.utils.format_datetime(datetime.fromtimestamp(int(time.time()) + 2, UTC), usegmt=True)
    weave.misbehave(next=["429"], retry_after=told)
    begin = time.monotonic()
    assert drain_traces(queue, weave_sink(weave.url), SPEC).num_delivered == 5
    assert 0.9 < time.monotonic() - begin < 4
    assert weave.get("/plan")["requests"] == 2


def test_a_retry_after_that_is_too_long_ends_the_drain_at_once(queue, weave, make_record):
    fill(queue, make_record, 0, 5)
    weave.misbehave(next=["429"] * 4, retry_after="3600")
    with pytest.raises(TransientError, match="asks to wait 3600 s"):
        drain_traces(queue, weave_sink(weave.url), SPEC)
    assert weave.get("/plan")["requests"] == 1


def test_a_copy_in_the_queue_is_delivered_once(queue, weave, make_record):
    fill(queue, make_record, 0, 3)
    queue.append([make_record(1).to_line(), make_record(0, replayed=True).to_line()])
    report = drain_traces(queue, weave_sink(weave.url), SPEC)
    assert (report.num_read, report.num_delivered, report.num_already_there) == (5, 3, 2)
    queue.append([make_record(2, replayed=True).to_line()])
    assert drain_traces(queue, weave_sink(weave.url), SPEC).num_already_there == 1
    assert len(weave.rows()) == 3
