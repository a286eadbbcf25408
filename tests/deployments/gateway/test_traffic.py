"""A running gateway follows the file of servers and shares: no answer is lost, each carries its own model's ids."""

import asyncio
import collections
import json
import threading
import time
from dataclasses import replace

import pytest

from deployments.gateway import traffic as subject
from deployments.gateway.settings import Settings
from deployments.gateway.upstream import Fleet
from tasks import files
from tasks.errors import CorruptError
from tests.deployments.gateway.conftest import UPSTREAM, Gateway, Server, chat_body, clean_environment, wait_until
from tests.ports import free_port


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two model servers."""
    import sys

    folder = tmp_path_factory.mktemp("pair")
    servers = []
    for _ in range(2):
        port = free_port()
        servers.append(Server([sys.executable, str(UPSTREAM), str(port)], port, clean_environment(), folder).start())
    yield servers
    for server in servers:
        server.stop()


def entry(name, server, weight, digest):
    ids = {"model_digest": digest, "adapter_digest": f"adapter-{digest}", "run_id": f"run-{digest}"}
    return {"name": name, "url": server.url, "weight": weight, **ids}


@pytest.fixture
def follow(tmp_path, pair):
    """A gateway on a file, and how the file is written."""
    path = tmp_path / "upstreams.json"
    old, new = pair

    def write(generation, old_weight, new_weight, until=0.0):
        servers = [entry("vllm", old, old_weight, "old"), entry("vllm-b", new, new_weight, "new")]
        shown = [server for server in servers if server["weight"] > 0]
        files.write_json(path, {"generation": generation, "until": until, "servers": shown})
        if generation > 1:
            wait_until(lambda: gateway.get("/health")["generation"] == generation, 5)

    write(1, 1, 0)
    gateway = Gateway(tmp_path, old.port, GATEWAY_UPSTREAMS_FILE=path).start()
    yield gateway, write
    gateway.stop()


def ids_of(headers):
    return tuple(headers[f"x-tatara-{name}"] for name in ("model-digest", "adapter-digest", "run-id"))


def ask_many(gateway, count):
    """Return how often each model answered; every trace must say the model that its answer's headers said."""
    answered = collections.Counter()
    for _ in range(count):
        status, headers, _ = gateway.chat()
        assert status == 200
        trace = gateway.trace(headers["x-request-id"])
        ids = ids_of(headers)
        assert (trace["model_digest"], trace["adapter_digest"], trace["run_id"]) == ids
        assert trace["upstream"] == {"old": "vllm", "new": "vllm-b"}[ids[0]]
        answered[ids[0]] += 1
    return answered


def test_each_answer_of_a_canary_carries_the_digest_of_the_model_that_wrote_it(follow):
    gateway, write = follow
    assert ask_many(gateway, 5) == {"old": 5}
    write(2, 1, 1.001)  # other weights than equal ones, which share by load
    answered = ask_many(gateway, 60)
    assert answered["old"] >= 10 and answered["new"] >= 10
    health = gateway.get("/health")
    assert [(each["name"], each["model_digest"]) for each in health["upstreams"]] == [
        ("vllm", "old"),
        ("vllm-b", "new"),
    ]
    assert health["upstreams"][1]["answered"] == answered["new"] and health["upstreams"][1]["failed"] == 0
    assert health["upstreams"][0]["answered"] == 5 + answered["old"]
    write(3, 0, 1)
    assert ask_many(gateway, 5) == {"new": 5}


def test_health_is_told_while_the_servers_change(pair):
    async def ask_and_change() -> dict[str, bool]:
        old, new = (subject.read_traffic({"generation": 1, "servers": [entry("vllm", each, 1, "x")]}) for each in pair)
        fleet = Fleet(Settings.from_environment({"VLLM_URL": pair[0].url}))
        fleet.apply(old.targets)
        asked = asyncio.create_task(fleet.health())
        await asyncio.sleep(0)  # it has asked the old server
        fleet.apply((*old.targets, replace(new.targets[0], name="vllm-b")))
        both = asyncio.create_task(fleet.health())
        await asyncio.sleep(0)
        fleet.apply(new.targets)
        assert await asked == {"vllm": True}
        return await both

    assert asyncio.run(ask_and_change()) == {"vllm": True, "vllm-b": True}


def test_no_request_is_lost_while_the_shares_move(follow):
    gateway, write = follow
    outcomes, stop = [], threading.Event()

    def keep_asking():
        while not stop.is_set():
            stream = gateway.post("/v1/chat/completions", chat_body(stream=True))
            outcomes.append((stream[0], stream[2].endswith(b"data: [DONE]\n\n")))

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    for generation, weights in enumerate([(9, 1), (1, 1.5), (0, 1), (1, 0), (0, 1)], start=2):
        write(generation, *weights)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(outcomes) > 20 and set(outcomes) == {(200, True)}


def test_a_server_that_was_left_out_ends_what_it_has_begun(follow):
    gateway, write = follow
    answer = []
    slow = threading.Thread(
        target=lambda: answer.append(gateway.post("/v1/chat/completions", chat_body("slow", stream=True)))
    )
    slow.start()
    wait_until(lambda: gateway.get("/health")["upstreams"][0]["in_flight"] == 1)
    write(2, 0, 1)
    shares = {each["name"]: (each["weight"], each["in_flight"]) for each in gateway.get("/health")["upstreams"]}
    slow.join()
    status, headers, body = answer[0]
    assert (status, headers["x-tatara-model-digest"], body.endswith(b"data: [DONE]\n\n")) == (200, "old", True)
    assert shares["vllm-b"] == (1, 0) and shares.get("vllm", (0, 1)) == (0.0, 1)
    wait_until(lambda: [each["name"] for each in gateway.get("/health")["upstreams"]] == ["vllm-b"], 5)


def test_a_canary_that_nobody_watches_over_any_more_ends_by_itself(follow):
    """Its promoter was killed: the time until which it counts does not move on."""
    gateway, write = follow
    write(2, 1, 1.001, until=time.time() + 2)
    assert ask_many(gateway, 30)["new"] > 0
    wait_until(lambda: [each["name"] for each in gateway.get("/health")["upstreams"]] == ["vllm"], 6)
    assert ask_many(gateway, 20) == {"old": 20}


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
def test_a_clock_that_is_set_changes_no_canary(tmp_path, monkeypatch, jump_s: float):
    servers = [{"name": name, "url": f"http://{name}:1", "weight": 1} for name in ("a", "b")]
    content = {"generation": 1, "until": time.time() + 1.0, "servers": servers}
    (tmp_path / "upstreams.json").write_text(json.dumps(content))
    file, clock = subject.TrafficFile(tmp_path / "upstreams.json"), time.time
    assert len(file.targets()) == 2
    monkeypatch.setattr(time, "time", lambda: clock() + jump_s)
    assert len(file.targets()) == 2
    time.sleep(1.1)
    assert [target.name for target in file.targets()] == ["a"]


def test_a_torn_file_changes_nothing_and_is_told(follow, tmp_path):
    gateway, write = follow
    (tmp_path / "upstreams.json").write_text('{"generation": 5, "serv')
    wait_until(lambda: "is not followed" in gateway.log.read_text(), 5)
    assert ask_many(gateway, 3) == {"old": 3}
    write(6, 0, 1)
    assert ask_many(gateway, 3) == {"new": 3}


def test_errors_are_counted_for_the_server_that_made_them(follow):
    gateway, write = follow
    write(2, 0, 1)
    for model in ("tiny", "error503", "dies-before"):
        gateway.chat(model)

    def counted():  # the last one is counted a moment after its answer
        counts = gateway.get("/health")["upstreams"][0]
        return (counts["name"], counts["failed"], counts["answered"]) == ("vllm-b", 2, 1)

    wait_until(counted, 5)


GOOD = {"generation": 1, "servers": [{"name": "vllm", "url": "http://a:1", "weight": 1}]}


@pytest.mark.parametrize(
    "change",
    [
        {"servers": []},
        {"servers": [GOOD["servers"][0]] * 2},
        {"servers": [{**GOOD["servers"][0], "weight": -1}]},
        {"servers": [{**GOOD["servers"][0], "url": "file:///etc/passwd"}]},
        {"servers": [{**GOOD["servers"][0], "run_id": "a\r\nset-cookie: x"}]},
        {"servers": "vllm"},
        {"generation": None},
        {"until": "soon"},
    ],
)
def test_a_file_that_makes_no_sense_is_refused_whole(change):
    assert subject.read_traffic(json.loads(json.dumps(GOOD)))
    with pytest.raises(CorruptError, match="the list of model servers is damaged"):
        subject.read_traffic({**GOOD, **change})
