"""The gateway's traces under faults, with exact counts: a real gateway process, killed, full, sampled, direct."""

import contextlib
import http.client
import json
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis

from tasks.traces.queue import FileQueue
from tests.needs import mount_tmpfs, redis_server

WEAVE = Path(__file__).parents[2] / "tasks" / "traces" / "weave_server.py"
KEY = "sk-proj-abcDEF0123456789xyz"


class Load:
    """Clients that ask without a pause and note the id of every answer that they saw whole."""

    def __init__(self, port, body, num_clients=6):
        self.whole = []
        self._stopped = threading.Event()
        self._body = json.dumps(body)
        self._threads = [threading.Thread(target=self._ask, args=(port,)) for _ in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self, port):
        while not self._stopped.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            with contextlib.suppress(OSError, http.client.HTTPException):
                while not self._stopped.is_set():
                    connection.request("POST", "/v1/chat/completions", self._body, {"content-type": "application/json"})
                    reply = connection.getresponse()
                    raw = reply.read()
                    if reply.status == 200 and raw.endswith((b"[DONE]\n\n", b"}")):
                        self.whole.append(reply.headers["x-request-id"])
            connection.close()
            time.sleep(0.01)

    def stop(self):
        self._stopped.set()
        for thread in self._threads:
            thread.join()


def in_queue(path):
    """Return the ids of all records that the queue holds, in order."""
    queue = FileQueue(path)
    assert queue.look()
    found = []
    while items := queue.read(500):
        found += [item.record.trace_id for item in items if item.record]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_gateway_killed_under_load_loses_and_doubles_no_trace(start_gateway, upstream, chat_body, stream):
    gateway = start_gateway(upstream.port, GATEWAY_TRACE_SEGMENT_BYTES=50_000)
    load = Load(gateway.port, chat_body(stream=stream))
    for pause_s in (0.5, 0.9, 0.7, 1.1):
        time.sleep(pause_s)
        gateway.stop(signal.SIGKILL)
        gateway.start()
    time.sleep(0.3)
    load.stop()
    gateway.stop(signal.SIGKILL)
    traces = in_queue(gateway.queue)
    assert len(load.whole) > 50
    assert len(traces) == len(set(traces))
    assert set(load.whole) <= set(traces)
    assert len(traces) - len(load.whole) <= 6 * 6  # those in flight when it was killed, at most one a client


def limit_file_size(gateway, size):
    """Make the kernel refuse writes beyond `size` bytes, as a full disk does; None: no limit again."""
    pid, (_, hard) = gateway.process.pid, resource.prlimit(gateway.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def test_a_full_disk_delays_traces_and_loses_none(start_gateway, upstream, wait_until):
    gateway = start_gateway(upstream.port)
    sent = [gateway.chat()[1]["x-request-id"] for _ in range(5)]
    limit_file_size(gateway, gateway.queue.stat().st_size + 1300)  # one more line, and a part of another
    for _ in range(20):
        status, headers, _ = gateway.chat()
        assert status == 200
        sent.append(headers["x-request-id"])
    counts = gateway.get("/health")["traces"]
    assert counts["written"] + counts["buffered"] == 25
    assert (counts["lost"], counts["buffered"] >= 18) == (0, True)
    assert gateway.queue.read_bytes().endswith(b"\n")  # the part was taken back
    limit_file_size(gateway, None)
    wait_until(lambda: gateway.get("/health")["traces"]["buffered"] == 0)
    sent.append(gateway.chat()[1]["x-request-id"])
    assert in_queue(gateway.queue) == sent
    assert "traces wait in memory" in gateway.log.read_text()


def test_only_what_overflows_the_hold_is_lost_and_it_is_counted(start_gateway, upstream, wait_until):
    gateway = start_gateway(upstream.port, GATEWAY_TRACE_HOLD_RECORDS=7)
    limit_file_size(gateway, 0)
    sent = [gateway.chat()[1]["x-request-id"] for _ in range(10)]
    counts = gateway.get("/health")["traces"]
    assert (counts["written"], counts["buffered"], counts["lost"]) == (0, 7, 3)
    limit_file_size(gateway, None)
    wait_until(lambda: gateway.get("/health")["traces"]["buffered"] == 0)
    assert in_queue(gateway.queue) == sent[:7]


def test_a_disk_that_is_really_full(start_gateway, upstream, tmp_path, wait_until):
    place = tmp_path / "traces"  # where the gateway's queue is
    place.mkdir()
    mount_tmpfs(place, "64k")
    try:
        gateway = start_gateway(upstream.port)
        sent = [gateway.chat()[1]["x-request-id"] for _ in range(120)]
        counts = gateway.get("/health")["traces"]
        assert (counts["lost"], counts["buffered"] > 0, counts["written"] + counts["buffered"]) == (0, True, 120)
        subprocess.run(["mount", "-o", "remount,size=1m", str(place)], check=True)
        wait_until(lambda: gateway.get("/health")["traces"]["buffered"] == 0)
        assert in_queue(gateway.queue) == sent
        gateway.stop()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def start_redis(tmp_path, unused_port, wait_until):
    binary = redis_server()
    started = []

    def start(*options):
        argv = [binary, "--port", str(unused_port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
        started.append(subprocess.Popen([*argv, *options], stdout=subprocess.DEVNULL))
        client = redis.Redis(port=unused_port)
        wait_until(lambda: _answers(client))
        return client

    start.kill = lambda: (started[-1].kill(), started[-1].wait())
    yield start
    for process in started:
        process.kill()
        process.wait()


def _answers(client):
    with contextlib.suppress(redis.RedisError):
        return client.ping()


def in_stream(client):
    return [json.loads(fields[b"record"])["trace_id"] for _, fields in client.xrange("llm_traces")]


def test_redis_killed_under_load_gets_every_trace_in_order(
    start_gateway, start_redis, upstream, chat_body, unused_port
):
    client = start_redis("--appendonly", "yes", "--appendfsync", "everysec")
    gateway = start_gateway(upstream.port, REDIS_URL=f"redis://127.0.0.1:{unused_port}/0")
    load = Load(gateway.port, chat_body(), num_clients=4)
    for _ in range(3):
        time.sleep(0.7)
        start_redis.kill()
        time.sleep(0.2)
        client = start_redis("--appendonly", "yes", "--appendfsync", "everysec")
    load.stop()
    gateway.stop()  # ships the rest
    arrived = in_stream(client)
    assert len(load.whole) > 50
    assert len(arrived) == len(set(arrived))
    assert set(load.whole) == set(arrived)
    assert in_queue(gateway.queue) == []


def test_a_full_redis_makes_the_spool_grow_and_gets_it_in_order(
    start_gateway, start_redis, upstream, unused_port, wait_until
):
    client = start_redis("--maxmemory", "1", "--maxmemory-policy", "noeviction")
    gateway = start_gateway(upstream.port, REDIS_URL=f"redis://127.0.0.1:{unused_port}/0")
    sent = [gateway.chat()[1]["x-request-id"] for _ in range(30)]
    wait_until(lambda: gateway.get("/health")["traces"]["waiting"] == 30)
    assert gateway.get("/health")["traces"]["redis"] is False
    client.config_set("maxmemory", "0")
    wait_until(lambda: gateway.get("/health")["traces"]["shipped"] == 30)
    assert in_stream(client) == sent
    wait_until(lambda: gateway.get("/health")["traces"]["waiting"] == 0)


def test_secrets_never_touch_the_disk_though_the_model_server_gets_them(start_gateway, upstream, chat_body):
    gateway = start_gateway(upstream.port, GATEWAY_REDACT="secrets,email")
    text = f"my key is {KEY}, mail a@b.co"
    tools = [{"function": {"name": "f", "arguments": json.dumps({"password": "hunter2"})}}]
    body = {"messages": [{"role": "assistant", "tool_calls": tools}, {"role": "user", "content": text}]}
    _, headers, _ = gateway.post("/v1/chat/completions", chat_body() | body)
    trace = gateway.trace(headers["x-request-id"])
    assert trace["redactions"] == {"secrets": 2, "email": 1}
    assert trace["request"]["messages"][1]["content"] == "my key is [redacted:secret], mail [redacted:email]"
    assert upstream.get("/seen")["requests"][-1]["body"]["messages"][1]["content"] == text
    kept = gateway.queue.read_bytes()
    assert not [secret for secret in (KEY, "hunter2", "a@b.co") if secret.encode() in kept]
    assert gateway.get("/health")["traces"]["redacted"] == 1


def test_sampling_keeps_failures_and_counts_what_it_leaves_out(start_gateway, upstream, chat_body):
    gateway = start_gateway(upstream.port, GATEWAY_TRACE_SAMPLE="0.5", GATEWAY_TRACE_BODIES="none")
    for _ in range(60):
        gateway.chat()
    for _ in range(10):
        gateway.chat("error503")
    traces = gateway.traces()
    counts = gateway.get("/health")["traces"]
    ok = [trace for trace in traces if trace["status"] == "ok"]
    failed = [trace for trace in traces if trace["status"] != "ok"]
    assert (len(failed), len(ok) + counts["sampled_out"], counts["written"]) == (10, 60, len(traces))
    assert 12 <= len(ok) <= 48
    assert {trace["sample_rate"] for trace in ok} == {0.5}
    assert {trace["sample_rate"] for trace in failed} == {1.0}
    assert {(trace["request"], trace["response"], trace["redactions"]["bodies"]) for trace in traces} == {
        (None, None, 1)
    }
    assert ok[0]["usage"]["total_tokens"] == 8
    assert {trace["error"] for trace in failed} == {"status 503"}


@pytest.fixture
def weave(unused_port, start_gateway, tmp_path, wait_until):
    """The Weave-like server of the drain's tests."""
    port = unused_port
    process = subprocess.Popen([sys.executable, str(WEAVE), str(port)])
    connection = lambda path: _get(port, path)  # noqa: E731
    wait_until(lambda: connection("/plan"))
    yield port, connection
    process.kill()
    process.wait()


def _get(port, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.suppress(OSError):
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
        raw = connection.getresponse().read()
        return json.loads(raw) if raw else True


@pytest.mark.slow
def test_the_direct_path_delivers_at_once_and_each_trace_once_though_the_gateway_is_killed(
    start_gateway, upstream, weave, wait_until, chat_body
):
    port, get = weave
    account = {"WANDB_API_KEY": "k" * 40, "WANDB_ENTITY": "team", "WF_TRACE_SERVER_URL": f"http://127.0.0.1:{port}"}
    gateway = start_gateway(upstream.port, GATEWAY_TRACE_DIRECT="true", TATARA_HOME=upstream.log.parent, **account)
    sent = [gateway.chat()[1]["x-request-id"] for _ in range(5)]
    wait_until(lambda: set(sent) <= set(get("/ids")))
    assert gateway.get("/health")["traces"]["direct"] is True
    load = Load(gateway.port, chat_body(), num_clients=3)
    time.sleep(1.0)
    gateway.stop(signal.SIGKILL)  # and its follower ends, because its pipe closes
    gateway.start()
    time.sleep(0.5)
    load.stop()
    sent += load.whole
    wait_until(lambda: set(sent) <= set(get("/ids")), 30)
    gateway.stop()
    counts = get("/ids")
    assert max(counts.values()) == 1
    assert in_queue(gateway.queue) == []
