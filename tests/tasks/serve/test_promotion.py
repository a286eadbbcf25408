"""Blue/green with real processes: the real gateway, and small servers in vLLM's place."""

import json
import multiprocessing
import os
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tasks import processes
from tasks.errors import CapacityError, PromotionError, ServiceError, SpecError, TransientError
from tasks.serve import promotion, services
from tasks.serve.services import ServiceSettings
from tasks.specs import PromoteSpec, ServeSpec
from tests.ports import free_port
from tests.waiting import wait_for

FAKE = """\
    #!{python} -E
    # Answers as vLLM does; mode.json in the model's folder says how, and may change while it runs.
    import http.server, json, os, pathlib, sys, time
    def value(flag):
        return sys.argv[sys.argv.index(flag) + 1]
    folder = pathlib.Path(sys.argv[sys.argv.index("serve") + 1])
    if not json.loads((folder / "mode.json").read_text()).get("starts", True):
        sys.exit("no such architecture")
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def log_message(self, *_):
            pass
        def say(self, status, body):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        def do_GET(self):
            self.say(200, {{"data": [{{"id": value("--served-model-name")}}]}})
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            mode = json.loads((folder / "mode.json").read_text())
            time.sleep(mode.get("delay_s", 0))
            if mode.get("dies"):
                os._exit(1)
            message = {{"role": "assistant", "content": folder.name}}
            choice = {{"index": 0, "finish_reason": "stop", "message": message}}
            self.say(500 if mode.get("fails") else 200, {{"choices": [choice], "model": folder.name}})
    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128
    Server(("127.0.0.1", int(value("--port"))), Handler).serve_forever()
"""
SPEC = PromoteSpec(strategy="blue_green", canary_share=0.5, canary_requests=20, canary_s=30, drain_s=20)


def _make_model(folder: Path, digest: str, **mode: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "mode.json").write_text(json.dumps(mode))
    (folder / "model.safetensors").write_text(digest)
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Iterator[ServiceSettings]:
    """What serves: a model called `old` behind the real gateway."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(textwrap.dedent(FAKE).format(python=sys.executable))
    python.chmod(0o755)
    (tmp_path / "env/lib/python3.11/site-packages/vllm-0+cpu.dist-info").mkdir(parents=True)
    ports = [free_port() for _ in range(3)]
    settings = ServiceSettings(
        model=str(_make_model(tmp_path / "old", "old")),
        spec=ServeSpec(vllm_port=ports[0], gateway_port=ports[1], second_port=ports[2], start_timeout_s=20),
        home=tmp_path / "home",
        variables={"PATH": os.environ["PATH"], "FILE_QUEUE_PATH": str(tmp_path / "traces.jsonl")},
        vllm_python=python,
        ids={"TATARA_MODEL_DIGEST": "digest-old", "TATARA_RUN_ID": "r1"},
    )
    services.start(settings)
    yield settings
    services.stop(settings)


def _newer(old: ServiceSettings, **mode: object) -> ServiceSettings:
    folder = _make_model(Path(old.model).with_name("new"), "new", **mode)
    return replace(old, model=str(folder), ids={"TATARA_MODEL_DIGEST": "digest-new", "TATARA_RUN_ID": "r2"})


def ask(settings: ServiceSettings) -> tuple[int, str, str]:
    """Return status, who answered, and the model digest that the answer's header says."""
    url = f"http://127.0.0.1:{settings.spec.gateway_port}/v1/chat/completions"
    body = json.dumps({"model": "gpt-oss-20b", "messages": [{"role": "user", "content": "?"}]}).encode()
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.load(reply)["model"], reply.headers["x-tatara-model-digest"] or ""
    except urllib.error.HTTPError as error:
        return error.code, "", error.headers["x-tatara-model-digest"] or ""


class Clients:
    """Some who keep asking while the body runs, and what each was told."""

    def __init__(self, settings: ServiceSettings, count: int = 3) -> None:
        self.settings, self.told, self._stop = settings, Counter(), threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(count)]

    def _work(self) -> None:
        while not self._stop.is_set():
            self.told[ask(self.settings)] += 1

    def __enter__(self) -> Counter:
        for thread in self._threads:
            thread.start()
        return self.told

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


OLD, NEW = (200, "old", "digest-old"), (200, "new", "digest-new")


def _running(settings: ServiceSettings) -> set[str]:
    return {name for name in ("vllm", "vllm-b", "gateway") if processes.find_alive(settings.identity_file(name))}


def _beside(settings: ServiceSettings) -> str:
    candidate = services.status(settings).candidate
    return candidate.state if candidate else ""


def test_a_good_model_takes_over_and_no_request_is_lost(old: ServiceSettings):
    new = _newer(old)
    assert promotion.choose_strategy(new, SPEC)[0] == "blue_green"
    gateway = services.status(old).gateway.pid
    said: list[str] = []
    with Clients(old) as told:
        candidate = promotion.start_candidate(new)
        assert ask(old) == OLD  # it waits beside
        assert _beside(old) == "ready"
        promotion.shift_traffic(candidate, SPEC, said.append)
        promotion.retire(new, SPEC)
    assert set(told) == {OLD, NEW} and told[NEW] >= 10
    assert "requests were answered" in said[0]
    assert _running(old) == {"vllm-b", "gateway"}
    now = services.status(new)
    assert (now.is_ready, now.vllm.model, now.candidate, now.gateway.pid) == (True, new.model, None, gateway)
    assert {ask(old) for _ in range(5)} == {NEW}
    again = services.start(new)  # what serves is found where it is
    assert (again.reused, again.vllm.pid, again.gateway.pid) == (True, now.vllm.pid, gateway)
    back = promotion.start_candidate(old)  # and the next one goes to the first port
    assert back.vllm_port == old.spec.vllm_port
    assert promotion.roll_back(old.home).startswith(f"{old.model} was stopped")
    assert {ask(old) for _ in range(5)} == {NEW}
    assert services.stop(new) == ["gateway", "vllm-b"] and _running(old) == set()


@pytest.mark.parametrize(
    ("mode", "error", "message"),
    [
        ({"fails": True}, PromotionError, r"\d+ of \d+ requests failed \(100\.0 %\), of the old model 0 of \d+ "),
        ({"delay_s": 0.3}, PromotionError, r"an answer took 0\.3\d\d s on the mean of \d+, of the old model 0\.\d+ s"),
        ({"dies": True}, (ServiceError, PromotionError), r"the new vLLM died as a canary|requests failed"),
    ],
)  # fmt: skip
def test_a_worse_model_is_taken_away_by_itself(old: ServiceSettings, mode: dict, error: type, message: str):
    new = _newer(old, **mode)
    with Clients(old), pytest.raises(error, match=message):
        promotion.shift_traffic(promotion.start_candidate(new), SPEC)
    time.sleep(1.5)  # the gateway looks once a second
    assert _running(old) == {"vllm", "gateway"}
    assert {ask(old) for _ in range(10)} == {OLD}
    assert services.status(old).candidate is None


def _promote_and_hang(new: ServiceSettings) -> None:
    os.setsid()
    promotion.LEASE_S = 3.0
    endless = SPEC.model_copy(update={"canary_requests": 10**6, "canary_s": 1000.0})
    promotion.shift_traffic(promotion.start_candidate(new), endless)


def test_killed_in_the_canary_the_old_model_serves_and_nothing_is_orphaned(old: ServiceSettings):
    new = _newer(old)
    promoter = multiprocessing.get_context("fork").Process(target=_promote_and_hang, args=(new,))
    promoter.start()
    with Clients(old, 1) as told:
        wait_for(lambda: told[NEW] > 3, 30)
        with pytest.raises(TransientError, match=r"a promotion \(pid \d+\) has a new model in vllm-b"):
            services.start(old)
        promoter.kill()
        promoter.join()
        assert _beside(old) == "abandoned"
        time.sleep(3.0 + 1.5)
        told.clear()
        time.sleep(1.0)
        assert set(told) == {OLD}  # by itself: nobody has said anything to the gateway
        assert services.start(old).reused
    assert set(told) == {OLD} and _running(old) == {"vllm", "gateway"}


def test_killed_before_the_old_one_was_stopped_the_new_model_serves(old: ServiceSettings):
    new = _newer(old)
    promotion.shift_traffic(promotion.start_candidate(new), SPEC.model_copy(update={"canary_share": 0.0}))
    assert _running(old) == {"vllm", "vllm-b", "gateway"}
    assert {ask(old) for _ in range(5)} == {NEW}
    assert services.start(new).reused and _running(old) == {"vllm-b", "gateway"}


def test_what_does_not_fit_beside_is_said_with_numbers_before_anything_starts(old: ServiceSettings):
    new = _newer(old)
    with (Path(new.model) / "model.safetensors").open("wb") as handle:
        handle.truncate(10**13)  # sparse
    with pytest.raises(CapacityError, match=r"needs about 10001\.8 GB of memory beside the old one, [\d.]+ GB are"):
        promotion.choose_strategy(new, SPEC)
    strategy, why = promotion.choose_strategy(new, SPEC.model_copy(update={"strategy": "auto"}))
    assert strategy == "replace" and "10001.8 GB" in why
    assert _running(old) == {"vllm", "gateway"}


def test_what_is_served_already_and_what_has_another_name_is_no_candidate(old: ServiceSettings):
    assert promotion.choose_strategy(old, SPEC) == ("replace", "it is served already")
    named = replace(_newer(old), spec=old.spec.model_copy(update={"served_model_name": "other"}))
    with pytest.raises(SpecError, match="clients ask for 'gpt-oss-20b', the new model is called 'other'"):
        promotion.choose_strategy(named, SPEC)
    services.stop(old)
    assert promotion.choose_strategy(named, SPEC)[0] == "replace"


def test_a_candidate_that_does_not_start_leaves_the_old_model_alone(old: ServiceSettings):
    with pytest.raises(ServiceError, match=r"vllm-b died before it was ready(.|\n)*no such architecture"):
        promotion.start_candidate(_newer(old, starts=False))
    assert _running(old) == {"vllm", "gateway"} and ask(old) == OLD
