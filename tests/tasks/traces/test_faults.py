"""Faults with exact counts: every record is in the store once, whatever was killed, full or slow.

The store keeps a row per arrival, so a copy is seen. What may be lost is said in docs/traces.md, and
then the test says exactly how much.
"""

import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

sys.path.insert(0, str(Path(__file__).parent))
from drains import Drains

from tasks.errors import CapacityError
from tasks.traces.queue import FileQueue
from tasks.traces.redis_stream import RedisQueue, ship
from tests.needs import redis_server
from tests.waiting import wait_for

KILLS = 24


@pytest.fixture
def start_drains(root):
    started = []

    def start(kind, place, url, **more):
        started.append(Drains(kind, place, url, root, **more))
        return started[-1]

    yield start
    for drains in started:
        drains.close()


@pytest.fixture(params=["file", "redis"])
def place(request, tmp_path):
    """(kind, where, how to fill it, how much waits)."""
    if request.param == "file":
        path = tmp_path / "q.jsonl"
        queue = FileQueue(path, segment_bytes=20_000)
        yield "file", path, queue
        queue.close()
    else:
        port = request.getfixturevalue("redis_port")
        client = redis.Redis(port=port)
        yield "redis", port, RedisQueue(client)
        client.close()


def fill(queue, make_record, count, poison=()):
    records = [make_record(n, **({"request": {"messages": "poison"}} if n in poison else {})) for n in range(count)]
    for at in range(0, count, 37):
        queue.append(record.to_line() for record in records[at : at + 37])
    return [record.trace_id for n, record in enumerate(records) if n not in poison]


def waiting(queue):
    if isinstance(queue, FileQueue):
        assert queue.look()
    return queue.lag()[0]


@pytest.mark.slow
def test_a_drain_killed_at_24_points_by_a_hostile_weave_delivers_each_record_once(
    place, start_drains, weave, make_record
):
    kind, where, queue = place
    dice = random.Random(5)
    expected = fill(queue, make_record, 400, poison={77, 301})
    faults = ["503-stored", "503", "429", "413", "dies-stored", "dies", "timeout-stored"]
    weave.misbehave(
        next=dice.choices([*faults, *["ok"] * 14], k=150), query=dice.choices(["503", *["ok"] * 6], k=40), delay_s=0.03
    )
    drains, kills, ended = start_drains(kind, where, weave.url), 0, collections.Counter()
    for _ in range(200):
        pid = drains.start()
        if kills < KILLS:
            time.sleep(dice.uniform(0.02, 0.35))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        status = drains.wait()
        kills += status == -signal.SIGKILL
        ended[status] += 1
        if status == 0:
            break
    assert kills >= 20, ended
    counts = weave.get("/ids")
    assert max(counts.values()) == 1
    assert sorted(counts) == sorted(expected)
    assert waiting(queue) == 0


@pytest.mark.slow
def test_two_drains_at_once_and_again_deliver_each_record_once(place, start_drains, weave, make_record):
    kind, where, queue = place
    expected = fill(queue, make_record, 300)
    weave.misbehave(delay_s=0.01)
    both = [start_drains(kind, where, weave.url, lock_s=5) for _ in range(2)]
    ended = collections.Counter()

    def drain(drains):
        for _ in range(6):
            drains.start()
            ended[drains.wait()] += 1

    threads = [threading.Thread(target=drain, args=(drains,)) for drains in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(ended) <= {0, 3, 5}  # 5: a request timed out on busy cores
    counts = weave.get("/ids")
    assert (max(counts.values()), sorted(counts)) == (1, sorted(expected))


def test_a_slow_weave_does_not_cost_a_drain_its_lock(start_drains, weave, make_record, redis_port):
    """A batch takes longer than the lock lives: it is renewed meanwhile, and nobody else sends it."""
    client = redis.Redis(port=redis_port)
    queue = RedisQueue(client)
    expected = fill(queue, make_record, 60)
    weave.misbehave(delay_s=0.3, next=[*["503"] * 5, "ok"] * 3)  # 5 graces and a delay: 1.05 s a batch
    first, second = (start_drains("redis", redis_port, weave.url, lock_s=0.9) for _ in range(2))
    first.start()
    wait_for(lambda: client.exists(f"{queue.stream}:drain"))  # on a busy machine it comes late
    ended, deadline = [], time.monotonic() + 1.5
    while time.monotonic() < deadline:
        second.start()
        ended.append(second.wait())
    assert (set(ended), first.wait()) == ({3}, 0)
    counts = weave.get("/ids")
    assert (max(counts.values()), sorted(counts)) == (1, sorted(expected))
    client.close()


@pytest.fixture
def start_redis(tmp_path, free):
    """Start redis-server again and again on the same data; all are killed at the end."""
    from conftest import _wait_for_port

    binary, port, started = redis_server(), free(), []

    def start(*options):
        argv = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path), *options]
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        started.append(process)
        _wait_for_port(port, process)
        return process, port

    yield start
    for process in started:
        process.kill()
        process.wait()


def ship_until_killed(spool, stream, process, after_s):
    """Ship small pieces until Redis is killed; return how many were shipped."""
    killer = threading.Timer(after_s, process.kill)
    killer.start()
    shipped = 0
    try:
        while True:
            shipped += ship(spool, stream, 3) or 0
    except Exception:  # noqa: BLE001 - whatever the dead server raises
        return shipped
    finally:
        killer.join()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["always", "everysec"])
def test_a_redis_that_is_killed_with_aof_loses_and_doubles_nothing(
    start_redis, start_drains, weave, make_record, tmp_path, policy
):
    options = ("--appendonly", "yes", "--appendfsync", policy)
    spool = FileQueue(tmp_path / "spool.jsonl")
    expected = fill(spool, make_record, 1500)
    assert spool.lock()
    for after_s in (0.05, 0.12, 0.2):
        process, port = start_redis(*options)
        stream = RedisQueue(redis.Redis(port=port, socket_timeout=2, retry=Retry(NoBackoff(), 0)))
        ship_until_killed(spool, stream, process, after_s)
        spool.rewind()
    process, port = start_redis(*options)
    stream = RedisQueue(redis.Redis(port=port))
    while ship(spool, stream, 500):
        pass
    drains = start_drains("redis", port, weave.url)
    assert drains.run_to_end() == 0
    counts = weave.get("/ids")
    assert (max(counts.values()), sorted(counts)) == (1, sorted(expected))
    spool.close()


def test_a_redis_that_is_killed_without_aof_loses_exactly_what_it_held(
    start_redis, start_drains, weave, make_record, tmp_path
):
    """What docs/traces.md says: all that was shipped and not yet delivered, and no more."""
    spool = FileQueue(tmp_path / "spool.jsonl")
    expected = fill(spool, make_record, 300)
    assert spool.lock()
    process, port = start_redis()
    stream = RedisQueue(redis.Redis(port=port))
    assert ship(spool, stream, 100) == 100
    drains = start_drains("redis", port, weave.url)
    assert drains.run_to_end() == 0  # 100 delivered
    assert ship(spool, stream, 50) == 50  # in Redis only
    process.kill()
    process.wait()
    start_redis()
    while ship(spool, RedisQueue(redis.Redis(port=port)), 500):
        pass
    assert drains.run_to_end() == 0
    counts = weave.get("/ids")
    assert (max(counts.values()), len(counts)) == (1, 250)
    assert sorted(counts) == sorted(expected[:100] + expected[150:])
    spool.close()


def test_a_full_redis_takes_the_rest_in_order_when_it_has_room(start_redis, make_record, tmp_path):
    _, port = start_redis("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    client = redis.Redis(port=port)
    spool, stream = FileQueue(tmp_path / "spool.jsonl"), RedisQueue(client)
    pad = {"messages": [{"role": "user", "content": "x" * 5000}]}
    spool.append(make_record(n, request=pad).to_line() for n in range(600))
    assert spool.lock()
    with pytest.raises(CapacityError, match="Redis is full"):
        while ship(spool, stream, 20):
            pass
    held = client.xlen("llm_traces")
    assert 0 < held < 600
    with pytest.raises(CapacityError):
        ship(spool, stream, 20)
    client.config_set("maxmemory", "0")
    while ship(spool, stream, 100):
        pass
    assert stream.lock()
    seen = []
    while items := stream.read(200):
        seen += [item.record.usage["completion_tokens"] for item in items]
        stream.ack(items)
    assert seen == list(range(600))
    stream.unlock()
    spool.close()


TORN = """
import os, signal, sys
from pathlib import Path
from tasks.traces.segments import SegmentWriter
real = os.write
def write(fd, data):
    real(fd, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
writer = SegmentWriter(Path(sys.argv[1]))
writer.append([b'{"whole": 1}\\n'])
os.write = write
writer.append([b'{"torn": 1}\\n'])
"""


def test_a_line_torn_by_a_kill_costs_no_other_writer_its_line(tmp_path, make_record, root):
    """Another process had the file open all the time: its next line must not be glued to the torn one."""
    queue = FileQueue(tmp_path / "q.jsonl")
    queue.append([make_record(0).to_line()])
    argv = [sys.executable, "-c", TORN, str(queue.path)]
    killed = subprocess.run(argv, env={**os.environ, "PYTHONPATH": str(root)}, timeout=60)
    assert killed.returncode == -9
    assert not queue.path.read_bytes().endswith(b"\n")
    queue.append([make_record(1).to_line()])
    assert queue.lock()
    items = queue.read(10)
    assert [item.record.usage["completion_tokens"] for item in items if item.record] == [0, 1]
    assert sum(item.record is None for item in items) == 2  # {"whole": 1} is no record, the torn line is no JSON
    queue.close()
