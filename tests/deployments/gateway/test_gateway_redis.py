"""The gateway with Redis: traces reach the stream, also after Redis was away."""

import signal
import socket
import subprocess

import pytest
import redis

from tasks.traces.redis_stream import RedisQueue
from tests.needs import redis_server


@pytest.fixture
def start_redis(tmp_path):
    """Start redis-server on a port, its data kept by AOF; without one: skip here, fail on CI."""
    binary = redis_server()
    started = []

    def start(port):
        argv = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
        durable = ["--appendonly", "yes", "--appendfsync", "always"]
        started.append(subprocess.Popen([*argv, *durable], stdout=subprocess.DEVNULL))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_traces_go_to_the_stream_in_order_though_redis_dies_and_comes_back(
    start_gateway, start_redis, upstream, unused_port, wait_until
):
    first = start_redis(unused_port)
    wait_until(lambda: listens(unused_port))
    gateway = start_gateway(upstream.port, REDIS_URL=f"redis://127.0.0.1:{unused_port}/0")
    client = redis.Redis(port=unused_port)
    sent = [gateway.chat()[1]["x-request-id"] for _ in range(20)]
    wait_until(lambda: client.xlen("llm_traces") == 20)
    wait_until(lambda: gateway.get("/health")["traces"]["shipped"] == 20)  # counted after Redis confirmed
    wanted = {"written": 20, "lost": 0, "buffered": 0, "redis": True, "shipped": 20}
    assert wanted.items() <= gateway.get("/health")["traces"].items()
    first.send_signal(signal.SIGKILL)
    first.wait()
    sent += [gateway.chat()[1]["x-request-id"] for _ in range(20)]  # answered as ever
    wait_until(lambda: gateway.get("/health")["traces"]["redis"] is False)
    start_redis(unused_port)
    wait_until(lambda: listens(unused_port))
    wait_until(lambda: client.xlen("llm_traces") == 40)
    gateway.stop(signal.SIGKILL)
    queue = RedisQueue(redis.Redis(port=unused_port))
    assert queue.lock()
    assert [item.record.trace_id for item in queue.read(100)] == sent


def test_a_sigkilled_gateways_spool_reaches_redis_by_the_next_gateway(
    start_gateway, start_redis, upstream, unused_port, wait_until
):
    gateway = start_gateway(upstream.port, REDIS_URL=f"redis://127.0.0.1:{unused_port}/0")  # Redis is away
    sent = [gateway.chat()[1]["x-request-id"] for _ in range(10)]
    gateway.stop(signal.SIGKILL)
    start_redis(unused_port)
    wait_until(lambda: listens(unused_port))
    client = redis.Redis(port=unused_port)
    for _ in range(2):  # the second one finds nothing to ship
        start_gateway(upstream.port, REDIS_URL=f"redis://127.0.0.1:{unused_port}/0").stop()
    arrived = [fields[b"record"] for _, fields in client.xrange("llm_traces")]
    assert len(arrived) == 10
    assert all(trace_id.encode() in line for trace_id, line in zip(sent, arrived, strict=True))
