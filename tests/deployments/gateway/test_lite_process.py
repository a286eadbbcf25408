"""LITE_MODEL as a folder: a real gateway, its own process, and a tiny gpt-oss that knows two chats by heart."""

import asyncio
import http.client
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.deployments.gateway.conftest import Gateway, clean_environment
from tests.deployments.lite.taught import CHATS, teach

pytestmark = pytest.mark.long

REASONING, ANSWER = CHATS["hi"]
RANDOM = {"model": "any", "prompt": "Once", "max_tokens": 400, "temperature": 1.9, "seed": 1}  # mostly without an end


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return teach(tmp_path_factory.mktemp("model") / "furnace")


@pytest.fixture(scope="module")
def lite(tmp_path_factory, upstream, model, wait_until):
    gateway = Gateway(tmp_path_factory.mktemp("lite"), upstream.port, LITE_MODEL=model).start()
    wait_until(lambda: state(gateway) == "up", 60)
    yield gateway
    gateway.stop()


def state(gateway):
    return gateway.get("/health")["lite_processes"][0]["state"]


def children(pid):
    """The processes of a gateway that serve a lite model, by id."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            stat = (place.parent / "stat").read_text().rpartition(")")[2].split()
            if int(stat[1]) == pid and b"deployments.lite" in place.read_bytes():
                found.append(int(place.parent.name))
        except OSError:
            continue
    return found


def cpu_ticks(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def complete(gateway, **more):
    status, headers, body = gateway.post("/v1/completions", RANDOM | more)
    return status, headers, json.loads(body)


@pytest.mark.slow
def test_the_gateway_answers_before_its_model_is_loaded_and_never_loads_torch(
    tmp_path, upstream, model, wait_until, unused_port
):
    gateway = Gateway(tmp_path, upstream.port, LITE_MODEL=model, LITE_PROCESSES=2).start()
    assert cpu_ticks(gateway.process.pid) < 1.5 * os.sysconf(
        "SC_CLK_TCK"
    )  # its first answer; other load does not count
    try:
        health = gateway.get("/health")
        assert (health["lite"], [each["state"] for each in health["lite_processes"]]) == (False, ["loading"] * 2)
        _, headers, _ = gateway.chat(text="hi")
        assert (headers["x-tatara-route"], headers["x-tatara-reason"]) == ("vllm", "lite-loading")
        trace = gateway.trace(headers["x-request-id"])
        assert (trace["route"], trace["reason"]) == ("vllm", "lite-loading")
        assert "libtorch" not in Path(f"/proc/{gateway.process.pid}/maps").read_text()
        wait_until(lambda: {each["state"] for each in gateway.get("/health")["lite_processes"]} == {"up"}, 120)
        assert "is down" not in gateway.log.read_text()  # to be loading is no fault
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda _: complete(gateway, max_tokens=100), range(2)))
        names = {gateway.trace(headers["x-request-id"])["upstream"] for _, headers, _ in both}
        assert names == {"lite-1", "lite-2"}
        assert "libtorch" not in Path(f"/proc/{gateway.process.pid}/maps").read_text()
        assert gateway.get("/health")["lite"] is True
    finally:
        pids = children(gateway.process.pid)
        gateway.stop()
    assert len(pids) == 2
    assert not any(map(is_alive, pids))


def test_only_the_final_channel_is_the_answer_and_its_tokens_are_counted(lite, model):
    status, headers, answer = lite.chat("gpt-oss-20b", "hi", temperature=0)
    choice = answer["choices"][0]
    assert (status, choice["message"]["content"], choice["finish_reason"]) == (200, ANSWER, "stop")
    assert choice["message"]["reasoning_content"] == REASONING
    assert (answer["model"], answer["object"]) == ("furnace", "chat.completion")
    assert (headers["x-tatara-route"], headers["x-tatara-reason"]) == ("lite", "short-prompt")
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    with torch.inference_mode():
        ids = AutoModelForCausalLM.from_pretrained(model).generate(
            torch.tensor([prompt]), max_new_tokens=200, do_sample=False
        )
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": ids.shape[1] - len(prompt),
        "total_tokens": ids.shape[1],
    }
    trace = lite.trace(headers["x-request-id"])
    assert (trace["route"], trace["upstream"], trace["model"], trace["usage"]) == (
        *("lite", "lite", "furnace"),
        answer["usage"],
    )
    status, _, body = lite.post("/v1/generate", {"model": "x", "input": "who?", "temperature": 0})
    assert (status, json.loads(body)["output"]) == (200, CHATS["who?"][1])


def test_a_stream_comes_token_by_token_and_says_the_same(lite):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{lite.url}/v1", api_key="x", max_retries=0) as client:
            chunks, times = [], []
            messages = [{"role": "user", "content": "hi"}]
            async for chunk in await client.chat.completions.create(
                model="m", messages=messages, temperature=0, stream=True
            ):
                chunks.append(chunk)
                times.append(time.monotonic())
            return chunks, times

    chunks, times = asyncio.run(ask())
    said = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert ("".join(said), chunks[-1].choices[0].finish_reason) == (ANSWER, "stop")
    assert len([piece for piece in said if piece]) == len(ANSWER)  # a character each: its tokens are bytes
    assert len({round(moment, 3) for moment in times}) > 1  # as they were made, not all at once
    usage = wait_for_usage(lite)
    assert usage["completion_tokens"] > len(ANSWER)


def wait_for_usage(gateway):
    return next(trace for trace in reversed(gateway.traces()) if trace["streamed"])["usage"]


def test_it_says_what_transformers_says(lite, model):
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    ids = tokenizer("Once", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        made = loaded.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    _, _, answer = complete(lite, max_tokens=40, temperature=0)
    assert answer["usage"]["completion_tokens"] == len(made)
    got, wanted = answer["choices"][0]["text"], tokenizer.decode(made, skip_special_tokens=True)
    assert got.replace("\ufffd", "") == wanted.replace("\ufffd", "")


def test_limits_seeds_and_stop_texts_are_kept(lite):
    _, _, answer = complete(lite, max_tokens=9)
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (9, "length")
    texts = [complete(lite, max_tokens=30, seed=seed)[2]["choices"][0]["text"] for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]
    narrow = [complete(lite, max_tokens=30, seed=seed, top_p=1e-6)[2]["choices"][0]["text"] for seed in (5, 6)]
    assert narrow[0] == narrow[1]  # the likeliest token alone
    _, _, answer = lite.chat("m", "hi", temperature=0, stop="、")
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (ANSWER.partition("、")[0], "stop")
    assert answer["usage"]["completion_tokens"] < 59


def test_what_it_can_not_do_goes_to_vllm_or_is_an_error_that_names_it(lite):
    for more in ({"n": 2}, {"tools": [{"type": "function"}]}, {"logprobs": True}):
        assert lite.chat("m", "hi", **more)[1]["x-tatara-route"] == "vllm"
    status, _, answer = lite.chat("m", "hi", temperature=9)
    assert (status, answer["error"]["message"]) == (400, "temperature=9: expected 0..2")


@pytest.fixture(scope="module")
def long_one(lite):
    """The question with the longest of some answers: where an end is drawn depends on the processor's arithmetic."""
    asked = [RANDOM | {"seed": seed, "max_tokens": 450} for seed in range(1, 31)]
    return max(asked, key=lambda body: complete(lite, **body)[2]["usage"]["completion_tokens"])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_ends_the_generation(lite, wait_until, long_one, stream):
    [child] = children(lite.process.pid)
    connection = http.client.HTTPConnection("127.0.0.1", lite.port, timeout=20)
    body = json.dumps(long_one | {"stream": stream})
    before = cpu_ticks(child)
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    wait_until(lambda: cpu_ticks(child) > before + 8, 10)  # it works on it
    connection.sock.close()
    connection.close()
    trace = wait_until(lambda: [each for each in lite.traces() if each["status"] == "cancelled"], 5)[-1]
    assert (trace["route"], trace["http_status"]) == ("lite", 499)
    time.sleep(0.3)
    then = cpu_ticks(child)
    time.sleep(0.5)
    assert cpu_ticks(child) - then <= 3


@pytest.mark.slow
def test_whoever_finds_it_full_goes_to_vllm(tmp_path, upstream, model, wait_until):
    gateway = Gateway(tmp_path, upstream.port, LITE_MODEL=model, LITE_MAX_WAITING=0, LITE_MODEL_NAME="small").start()
    try:
        wait_until(lambda: state(gateway) == "up", 60)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: complete(gateway, max_tokens=300), range(4)))
        routes = sorted((headers["x-tatara-route"], headers["x-tatara-reason"]) for _, headers, _ in answers)
        served = routes.count(("lite", "short-prompt"))  # a short answer may be over before the last request comes
        assert 1 <= served < 4 and routes.count(("vllm", "lite-busy")) == 4 - served
        assert {answer["model"] for _, _, answer in answers} == {"small", "any"}
    finally:
        gateway.stop()


@pytest.mark.slow
def test_a_process_that_dies_is_started_again_and_none_outlives_the_gateway(tmp_path, upstream, model, wait_until):
    gateway = Gateway(tmp_path, upstream.port, LITE_MODEL=model).start()
    try:
        wait_until(lambda: state(gateway) == "up", 60)
        [child] = children(gateway.process.pid)
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: state(gateway) != "up", 5)
        _, headers, _ = gateway.chat(text="hi")
        assert (headers["x-tatara-route"], headers["x-tatara-reason"]) in [
            ("vllm", "lite-down"),
            ("vllm", "lite-loading"),
        ]
        wait_until(lambda: state(gateway) == "up", 60)
        assert gateway.get("/health")["lite_processes"] == [{"name": "lite", "state": "up", "restarts": 1}]
        assert gateway.chat(text="hi", temperature=0)[2]["choices"][0]["message"]["content"] == ANSWER
        [second] = children(gateway.process.pid)
        [folder] = [
            part for part in Path(f"/proc/{second}/cmdline").read_bytes().split(b"\0") if b"tatara-lite-" in part
        ]
        assert Path(folder.decode()).is_socket()
        gateway.stop(signal.SIGKILL)
        wait_until(lambda: not is_alive(second), 5)
        assert not Path(folder.decode()).parent.exists()
    finally:
        gateway.stop()


@pytest.mark.slow
def test_a_model_that_can_not_be_loaded_costs_the_gateway_nothing(tmp_path, upstream, wait_until):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "gpt_oss"}')
    gateway = Gateway(tmp_path, upstream.port, LITE_MODEL=broken).start()
    try:
        wait_until(lambda: "ended with status 1: starting it again in 1 s" in gateway.log.read_text(), 60)
        assert f"LITE_MODEL='{broken}' can't be loaded" in gateway.log.read_text()
        assert gateway.chat(text="hi")[1]["x-tatara-route"] == "vllm"
    finally:
        gateway.stop()


@pytest.mark.parametrize(
    ("model", "message"),
    [("{tmp}", "is a folder without config.json"), ("./not/there", "is no folder that is there"), ("word", "Hub id")],
)
def test_a_wrong_lite_model_ends_the_start_with_one_line(tmp_path, unused_port, model, message):
    import subprocess
    import sys

    own = {"LITE_MODEL": model.format(tmp=tmp_path), "FILE_QUEUE_PATH": tmp_path / "t.jsonl"}
    environment = clean_environment(LITE_GATEWAY_PORT=unused_port, **own)
    argv = [sys.executable, "-m", "deployments.gateway"]
    done = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr
