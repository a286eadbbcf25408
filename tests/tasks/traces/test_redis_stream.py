"""Against a real redis-server, started by each test."""

import time

import pytest
import redis

from tasks.errors import CapacityError, TransientError
from tasks.traces.queue import FileQueue
from tasks.traces.redis_stream import RedisQueue, ship


def numbers(items):
    return [item.record.usage["completion_tokens"] for item in items if item.record]


@pytest.fixture
def client(redis_port):
    made = redis.Redis(port=redis_port)
    yield made
    made.close()


def test_records_leave_the_stream_only_when_acknowledged(client, make_record):
    queue = RedisQueue(client)
    queue.append(make_record(n).to_line() for n in range(5))
    assert queue.lock()
    first = queue.read(3)
    assert (numbers(first), queue.lag()[0]) == ([0, 1, 2], 5)
    queue.ack(first)
    assert queue.lag() == (2, make_record(3).started_at)
    assert numbers(queue.read(10)) == [3, 4]
    assert queue.read(10) == []


def test_what_a_dead_consumer_left_comes_back_marked(client, make_record):
    dead = RedisQueue(client, lock_s=0.2)
    dead.append(make_record(n).to_line() for n in range(5))
    assert dead.lock()
    dead.read(2)
    dead._done.set()  # a dead process renews no lock
    heir = RedisQueue(client)
    assert not heir.lock()
    time.sleep(0.25)
    assert heir.lock()
    left, fresh = heir.read(10), heir.read(10)
    assert [(numbers(items), {item.redelivered for item in items}) for items in (left, fresh)] == [
        ([0, 1], {True}),
        ([2, 3, 4], {False}),
    ]
    with pytest.raises(TransientError, match="lost its lock"):
        dead.read(1)


def test_a_dead_letter_leaves_the_stream_in_one_step(client, make_record):
    queue = RedisQueue(client)
    queue.append([b"not json\n", make_record(1).to_line()])
    assert queue.lock()
    bad, good = queue.read(10)
    assert bad.record is None
    queue.bury([(bad, bad.problem)])
    queue.ack([bad, good])
    assert queue.lag() == (0, None)
    letter = client.xrange("llm_traces:dead")[0][1]
    assert letter[b"record"] == b"not json\n"
    assert b"is no JSON" in letter[b"reason"]


def test_shipping_twice_adds_nothing_and_keeps_the_order(client, make_record, tmp_path):
    spool, queue = FileQueue(tmp_path / "q.jsonl"), RedisQueue(client)
    spool.append(make_record(n).to_line() for n in range(7))
    assert spool.lock()
    items = spool.read(4)
    assert queue.take_over(spool.queue_id, items) == 4  # and a SIGKILL before the cursor moved
    spool.rewind()
    assert [ship(spool, queue, 5), ship(spool, queue, 5), ship(spool, queue, 5)] == [5, 2, 0]
    assert queue.lock()
    assert numbers(queue.read(100)) == list(range(7))
    spool.close()


def test_a_full_redis_keeps_everything_in_the_spool(client, make_record, tmp_path):
    spool, queue = FileQueue(tmp_path / "q.jsonl"), RedisQueue(client)
    spool.append(make_record(n).to_line() for n in range(3))
    assert spool.lock()
    client.config_set("maxmemory", "1")
    with pytest.raises(CapacityError, match="Redis is full"):
        ship(spool, queue)
    client.config_set("maxmemory", "0")
    assert ship(spool, queue) == 3
    spool.close()


def test_a_redis_that_is_away_is_transient_and_its_password_stays_secret(free):
    queue = RedisQueue(redis.Redis.from_url(f"redis://:hunter2@127.0.0.1:{free()}", socket_connect_timeout=1))
    with pytest.raises(TransientError, match="Redis does not answer") as error:
        queue.lock()
    assert "hunter2" not in str(error.value)


def test_a_redis_that_would_evict_is_told_from_one_that_refuses(client):
    queue = RedisQueue(client)
    assert queue.evicts() is None
    client.config_set("maxmemory-policy", "allkeys-lru")
    assert queue.evicts() == "allkeys-lru"
