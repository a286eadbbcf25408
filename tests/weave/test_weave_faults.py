"""The drain against Weave's own server while answers are lost, batches refused and the drain killed.

The measure is always the same: records accepted by the queue = physical rows in ClickHouse, one each.
"""

import json
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tasks.errors import AccessError, MissingError, TransientError
from tasks.traces.queue import FileQueue
from tasks.traces.run import drain_traces, sink_from_environment
from tasks.traces.spec import DrainSpec

pytestmark = [pytest.mark.weave, pytest.mark.timeout(300)]
SPEC = DrainSpec(batch_records=10, grace_s=0.5, request_timeout_s=30)


@pytest.fixture
def drain(queue, weave):
    def run(spec=SPEC, **environment):
        return drain_traces(queue, sink_from_environment(spec, weave.environment(**environment)), spec)

    return run


def fill(queue, records):
    queue.append(record.to_line() for record in records)
    return {record.trace_id: 1 for record in records}


def letters(queue):
    """The dead letters: {trace id: reason}."""
    lines = Path(f"{queue.path}.dead").read_text().splitlines()
    return {json.loads(letter["line"])["trace_id"]: letter["reason"] for letter in map(json.loads, lines)}


@pytest.mark.parametrize("how", ["503", "503-stored", "500", "429", "cut", "cut-stored", "hang-stored"])
def test_a_lost_answer_neither_loses_nor_doubles(queue, drain, weave, make_record, how):
    expected = fill(queue, [make_record(n) for n in range(30)])
    weave.plan(next=["ok", how, how])
    report = drain(DrainSpec(batch_records=10, grace_s=0.5, request_timeout_s=2.0))
    assert weave.rows() == expected
    assert (report.num_delivered + report.num_already_there, report.num_dead, report.num_waiting) == (30, 0, 0)
    assert report.num_already_there == (20 if how.endswith("stored") else 0)
    assert sorted(len(calls) for calls in weave.calls().values()) == [1] * 30


def test_a_server_that_stays_away_costs_nothing_and_the_next_drain_goes_on(queue, drain, weave, make_record):
    expected = fill(queue, [make_record(n) for n in range(20)])
    for plan in ({"next": ["503"] * 4}, {"next": ["429"] * 4}, {"next": ["503-stored"], "next_query": ["503"] * 4}):
        weave.plan(**plan)
        with pytest.raises(TransientError):
            drain()
    assert drain().num_waiting == 0
    assert weave.rows() == expected


def test_a_question_that_fails_once_is_asked_again(queue, drain, weave, make_record):
    expected = fill(queue, [make_record(n) for n in range(20)])
    weave.plan(next=["503-stored"], next_query=["503"])
    assert drain().num_waiting == 0
    assert weave.rows() == expected


def test_retry_after_is_obeyed(queue, drain, weave, make_record):
    expected = fill(queue, [make_record(0)])
    weave.plan(next=["429"], retry_after="1.5")
    started = time.monotonic()
    drain()
    assert time.monotonic() - started > 1.5
    assert weave.rows() == expected


def test_413_halves_down_to_the_oversize_record_and_the_rest_arrives(queue, drain, weave, make_record):
    huge = make_record(5, request={"messages": [{"role": "user", "content": str(n)} for n in range(20_000)]})
    expected = fill(queue, [make_record(n) for n in range(5)])
    queue.append([huge.to_line()])
    expected |= fill(queue, [make_record(n) for n in range(6, 10)])
    weave.plan(max_body_bytes=200_000)
    report = drain()
    assert weave.rows() == expected
    assert (report.num_delivered, report.num_dead) == (9, 1)
    assert list(letters(queue)) == [huge.trace_id]
    assert "413" in letters(queue)[huge.trace_id]


def test_records_that_the_server_refuses_are_buried_one_by_one(queue, drain, weave, make_record):
    poison = {
        "no-uuid": make_record(1, trace_id="no-uuid"),
        "long-name": make_record(4, trace_id="01a3185c-5000-7004-8000-0000000000aa", endpoint="/v1/" + "x" * 200),
    }
    records = [poison.get({1: "no-uuid", 4: "long-name"}.get(n, ""), make_record(n)) for n in range(8)]
    expected = {record.trace_id: 1 for record in records if record not in poison.values()}
    fill(queue, records)
    report = drain()
    assert weave.rows() == expected
    assert (report.num_delivered, report.num_dead) == (6, 2)
    assert set(letters(queue)) == {record.trace_id for record in poison.values()}
    assert "Invalid UUID" in letters(queue)["no-uuid"]


def nested(depth):
    return json.loads("[" * depth + "]" * depth)


@pytest.mark.parametrize(
    "content",
    [
        "weave:///somebody/else/object/x:abc",
        "weave:///",
        "weave-trace-internal:///UHJvamVjdA==/object/x:abc",
        json.dumps({"see": "weave:///somebody/else/op/f:latest"}),
        "half a pair \ud800 \udc00",
        "nul \x00, not a number NaN, {'a': 1}",
        float("nan"),
        10**40,
        nested(150),
        nested(700),
    ],
    ids=["ref", "bad-ref", "internal-ref", "ref-in-json", "surrogate", "nul", "nan", "big", "deep", "deeper"],
)
def test_nothing_that_a_user_can_write_stops_the_traces_of_others(queue, drain, weave, make_record, content):
    odd = make_record(1, request={"model": "tiny", "messages": [{"role": "user", "content": content}]})
    expected = fill(queue, [make_record(0), odd, make_record(2)])
    report = drain()
    assert (report.num_delivered, report.num_dead, report.num_waiting) == (3, 0, 0)
    assert weave.rows() == expected
    assert len(weave.calls()) == 3  # the project can still be read


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"WANDB_API_KEY": "f" * 40}, AccessError, "WANDB_API_KEY is wrong or expired"),
        ({"WANDB_API_KEY": "too short"}, AccessError, "WANDB_API_KEY is wrong or expired"),
        ({"WANDB_ENTITY": "strangers"}, AccessError, "may not write to strangers/"),
        ({"WANDB_PROJECT": "absent"}, MissingError, "404 for team/absent: check entity and project"),
    ],
)
def test_wrong_key_entity_and_project_are_said_and_cost_nothing(
    queue, drain, weave, make_record, changes, kind, message
):
    expected = fill(queue, [make_record(n) for n in range(3)])
    with pytest.raises(kind, match=message):
        drain(**changes)
    assert weave.rows() == {}
    assert drain().num_dead == 0
    assert weave.rows() == expected


DRAIN = """
from tasks.traces.run import drain_traces, queue_from_environment, sink_from_environment
from tasks.traces.spec import DrainSpec
spec = DrainSpec(batch_records=20, grace_s=1.0, request_timeout_s=20)
queue, sink = queue_from_environment(), sink_from_environment(spec)
print("ready", flush=True)
print(drain_traces(queue, sink, spec).status)
"""


def test_a_drain_killed_twenty_times_delivers_each_record_once(queue, weave, make_record, python):
    expected = fill(queue, [make_record(n) for n in range(1500)])
    dice = random.Random(20)
    weave.plan(delay_s=0.05, next=dice.choices(["ok", "503-stored", "cut-stored", "503"], [12, 1, 1, 1], k=60))
    environment = weave.environment(FILE_QUEUE_PATH=str(queue.path))
    kills, status = 0, b""
    while status != b"drained":
        drain = subprocess.Popen([python, "-c", DRAIN], env=environment, stdout=subprocess.PIPE)
        assert drain.stdout.readline() == b"ready\n"
        if kills < 22:
            time.sleep(dice.uniform(0.0, 0.6) + dice.choice([0.0, 1.0]))  # the second drain begins with its grace
            drain.send_signal(signal.SIGKILL)
        status = drain.communicate(timeout=200)[0].strip()
        kills += drain.returncode == -signal.SIGKILL
    assert kills >= 20
    assert weave.rows() == expected
    assert weave.count() == len(expected)
    assert not Path(f"{queue.path}.dead").exists()


def test_two_drains_at_once_send_each_record_once(queue, weave, make_record, python):
    expected = fill(queue, [make_record(n) for n in range(200)])
    weave.plan(delay_s=0.05)
    environment = weave.environment(FILE_QUEUE_PATH=str(queue.path))
    drains = [
        subprocess.Popen([python, "-c", DRAIN], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    statuses = sorted(drain.communicate(timeout=100)[0].split()[-1] for drain in drains)
    assert statuses in (["busy", "drained"], ["drained", "drained"])  # the second when one was late
    assert weave.rows() == expected


def test_records_that_arrive_while_a_drain_runs_are_delivered_once(queue, drain, weave, make_record):
    records = [make_record(n) for n in range(300)]
    writer = FileQueue(queue.path)

    def write():
        for record in records:
            writer.append([record.to_line()])
            time.sleep(0.003)

    thread = threading.Thread(target=write)
    thread.start()
    while thread.is_alive():
        drain()
    drain()
    writer.close()
    assert weave.rows() == {record.trace_id: 1 for record in records}
