"""The drain against a Weave-like server that keeps every copy: one row per record, whatever happens."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import redis

from tasks.errors import AccessError, SpecError, TransientError
from tasks.traces.calls import call
from tasks.traces.queue import FileQueue
from tasks.traces.redis_stream import RedisQueue
from tasks.traces.run import drain_traces, open_queue, queue_from_environment, sink_from_environment
from tasks.traces.spec import DrainSpec
from tasks.traces.weave_sink import WeaveSink

SPEC = DrainSpec(batch_records=10, grace_s=0.0, request_timeout_s=2.0)


def sink(weave, spec=SPEC):
    return WeaveSink(httpx.Client(base_url=weave.url, auth=("api", "key")), "team/tatara", spec)


@pytest.fixture
def queue(tmp_path):
    made = FileQueue(tmp_path / "q.jsonl")
    yield made
    made.close()


def ids(rows):
    return sorted(row["id"] for row in rows)


def fill(queue, make_record, count):
    records = [make_record(n) for n in range(count)]
    queue.append(record.to_line() for record in records)
    return sorted(record.trace_id for record in records)


def test_every_record_arrives_once_with_its_times_usage_and_shape(queue, weave, make_record):
    expected = fill(queue, make_record, 25)
    report = drain_traces(queue, sink(weave), SPEC)
    assert (report.status, report.num_read, report.num_delivered, report.num_waiting) == ("drained", 25, 25, 0)
    rows = weave.rows()
    assert ids(rows) == expected
    row, record = rows[7], make_record(7)
    assert (row["started_at"], row["ended_at"]) == (record.started_at, record.ended_at)
    assert row["summary"]["usage"] == {"tiny": {"requests": 1} | record.usage}
    assert row["inputs"]["messages"] == record.request["messages"]
    assert row["output"]["choices"] == record.response["choices"]
    assert weave.get("/plan")["requests"] == 3
    assert weave.get("/plan")["auth"].startswith("Basic ")
    assert drain_traces(queue, sink(weave), SPEC).num_read == 0


@pytest.mark.parametrize("how", ["503-stored", "503", "429", "timeout-stored"])
def test_an_answer_that_says_nothing_doubles_and_loses_nothing(queue, weave, make_record, how):
    expected = fill(queue, make_record, 20)
    weave.misbehave(next=[how])
    spec = DrainSpec(batch_records=10, grace_s=0.1, request_timeout_s=0.5)
    report = drain_traces(queue, sink(weave, spec), spec)
    assert ids(weave.rows()) == expected
    assert report.num_already_there == (10 if how.endswith("stored") else 0)
    assert (report.num_delivered + report.num_already_there, report.num_dead) == (20, 0)


def test_a_server_that_stays_away_is_transient_and_nothing_is_lost(queue, weave, make_record, free):
    expected = fill(queue, make_record, 5)
    weave.misbehave(next=["503"] * 4)
    with pytest.raises(TransientError):
        drain_traces(queue, sink(weave), SPEC)
    nobody = WeaveSink(httpx.Client(base_url=f"http://127.0.0.1:{free()}"), "team/tatara", SPEC)
    with pytest.raises(TransientError):
        drain_traces(queue, nobody, SPEC)
    assert drain_traces(queue, sink(weave), SPEC).num_delivered == 5
    assert ids(weave.rows()) == expected


def test_a_poison_record_is_found_and_buried_and_the_rest_arrives(queue, weave, make_record):
    expected = fill(queue, make_record, 6)
    queue.append([make_record(6, request={"messages": "poison"}).to_line(), b"torn {\n"])
    expected = sorted([*expected, *fill_more(queue, make_record)])
    report = drain_traces(queue, sink(weave), DrainSpec(grace_s=0.0))
    assert ids(weave.rows()) == expected
    assert (report.num_dead, report.num_delivered, report.num_waiting) == (2, 9, 0)
    letters = [json.loads(line) for line in Path(f"{queue.path}.dead").read_text().splitlines()]
    assert sorted(letter["reason"].split(" (")[0][:20] for letter in letters) == sorted(
        ["a line of 7 bytes is", "Weave refused it wit"]
    )
    assert "poison in the batch" in " ".join(report.failures)
    assert "| dead letters | 2 |" in report.to_markdown()


def fill_more(queue, make_record):
    records = [make_record(n) for n in range(10, 13)]
    queue.append(record.to_line() for record in records)
    return [record.trace_id for record in records]


def test_a_huge_record_is_cut_rather_than_refused(make_record):
    record = make_record(1, request={"messages": [{"role": "user", "content": "x" * 5_000_000}]})
    value = call(record, "team/tatara", 3 << 20)
    assert len(json.dumps(value)) < 10_000
    assert value["attributes"]["tatara"]["cut_to_chars"] == 2000
    assert value["inputs"]["messages"][0]["content"].endswith("[4998000 more characters]")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("401", "WANDB_API_KEY is wrong"),
        ("404", "404 for team/tatara: check entity and project .*create the project at https://wandb.ai/team"),
    ],
)
def test_wrong_keys_and_projects_are_told_apart_and_keep_the_queue(queue, weave, make_record, how, message):
    fill(queue, make_record, 2)
    weave.misbehave(next=[how])
    with pytest.raises(Exception, match=message):
        drain_traces(queue, sink(weave), SPEC)
    assert drain_traces(queue, sink(weave), SPEC).num_read == 2


def test_a_second_drain_returns_at_once(queue, weave, make_record, tmp_path):
    fill(queue, make_record, 3)
    other = FileQueue(tmp_path / "q.jsonl")
    assert other.lock()
    assert drain_traces(queue, sink(weave), SPEC).status == "busy"
    other.close()
    assert weave.rows() == []


def test_the_time_limit_leaves_the_rest_for_the_next_drain(queue, weave, make_record):
    fill(queue, make_record, 30)
    spec = DrainSpec(batch_records=10, max_seconds=1e-9)
    report = drain_traces(queue, sink(weave, spec), spec)
    assert (report.status, report.num_read, report.num_waiting) == ("partial", 10, 20)


DRAIN = """
import sys, httpx
from pathlib import Path
import redis
from tasks.traces.run import drain_traces
from tasks.traces.queue import FileQueue
from tasks.traces.redis_stream import RedisQueue
from tasks.traces.spec import DrainSpec
from tasks.traces.weave_sink import WeaveSink
kind, place, url = sys.argv[1:]
queue = FileQueue(Path(place)) if kind == "file" else RedisQueue(redis.Redis(port=int(place)), lock_s=0.3)
spec = DrainSpec(batch_records=5, grace_s=0.2, request_timeout_s=5)
sink = WeaveSink(httpx.Client(base_url=url), "team/tatara", spec)
print("ready", flush=True)
print(drain_traces(queue, sink, spec).status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "redis"])
def test_a_drain_killed_again_and_again_delivers_each_record_once(
    kind, queue, weave, make_record, root, request, capsys
):
    place = str(queue.path) if kind == "file" else str(request.getfixturevalue("redis_port"))
    target = queue if kind == "file" else RedisQueue(redis.Redis(port=int(place)))
    expected = fill(target, make_record, 150)
    weave.misbehave(delay_s=0.05, next=random.Random(7).choices(["ok", "503-stored"], k=12))
    kills, dice = 0, random.Random(1)
    for _ in range(60):
        argv = [sys.executable, "-c", DRAIN, kind, place, weave.url]
        drain = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.PIPE)
        assert drain.stdout.readline() == b"ready\n"
        if kills < 6:
            time.sleep(dice.uniform(0.05, 0.5))
            drain.send_signal(signal.SIGKILL)
            kills += 1
        status = drain.communicate(timeout=60)[0].strip()
        if kind == "redis":
            time.sleep(0.3)  # the dead drain's lock expires
        if status == b"drained":
            break
    assert ids(weave.rows()) == expected
    assert kills == 6
    assert target.lock()
    assert target.lag()[0] == 0


def test_a_spool_that_a_dead_gateway_left_is_shipped_before_redis_is_drained(redis_port, weave, make_record, tmp_path):
    spool = FileQueue(tmp_path / "spool.jsonl")
    expected = fill(spool, make_record, 12)
    spool.close()
    target = open_queue(tmp_path / "spool.jsonl", redis.Redis(port=redis_port))
    assert drain_traces(target, sink(weave), SPEC).num_delivered == 12
    assert ids(weave.rows()) == expected


def test_the_environment_chooses_queue_and_sink(tmp_path):
    assert sink_from_environment(SPEC, {}).name == "wandb-offline"
    assert sink_from_environment(SPEC, {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}).name == "wandb-offline"
    assert sink_from_environment(SPEC, {"WANDB_API_KEY": "k", "WANDB_ENTITY": "e"}).name == "weave"
    with pytest.raises(SpecError, match="WANDB_ENTITY is not"):
        sink_from_environment(SPEC, {"WANDB_API_KEY": "k"})
    with pytest.raises(SpecError, match="REDIS_URL is no"):
        queue_from_environment({"REDIS_URL": "nonsense"})
    assert isinstance(queue_from_environment({"FILE_QUEUE_PATH": str(tmp_path / "x.jsonl")}), FileQueue)


def test_access_errors_are_never_retried():
    from tasks.traces.task import drain_traces as task

    class State:
        def __init__(self, data):
            self.data = data

    retry = task.retry_condition_fn
    assert retry(task, None, State(TransientError("away")))
    assert not retry(task, None, State(AccessError("401")))
    assert not retry(task, None, State(None))
