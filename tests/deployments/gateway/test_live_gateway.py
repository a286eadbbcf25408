"""A real gateway process in front of a real small server: what clients see, and what is recorded."""

import asyncio
import http.client
import json
import signal
import socket
import time
from itertools import pairwise

import openai
import pytest

SAID = "祭りは fun!"


def open_stream(gateway, body, path="/v1/chat/completions"):
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=20)
    connection.request("POST", path, json.dumps(body | {"stream": True}), {"content-type": "application/json"})
    return connection, connection.getresponse()


def test_a_chat_is_forwarded_unchanged_and_recorded(gateway, upstream, chat_body):
    body = chat_body(new_field={"x": [1, None]}, max_tokens=5)
    status, headers, answer = gateway.chat(**{k: v for k, v in body.items() if k not in ("messages", "model")})
    assert (status, answer["choices"][0]["message"]["content"]) == (200, SAID)
    assert (headers["x-tatara-route"], headers["x-tatara-reason"]) == ("vllm", "no-lite-model")
    arrived = upstream.get("/seen")["requests"][-1]
    assert arrived["body"] == body
    assert arrived["headers"]["x-request-id"] == headers["x-request-id"]
    trace = gateway.trace(headers["x-request-id"])
    assert (trace["status"], trace["http_status"], trace["streamed"], trace["model"]) == ("ok", 200, False, "tiny")
    assert (trace["request"], trace["response"]) == (body, answer)
    assert trace["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert trace["started_at"] < trace["first_token_at"] <= trace["ended_at"]


def test_completions_and_generate(gateway):
    status, headers, raw = gateway.post("/v1/completions", {"model": "tiny", "prompt": "x"})
    assert (status, json.loads(raw)["choices"][0]["text"]) == (200, SAID)
    assert gateway.trace(headers["x-request-id"])["endpoint"] == "/v1/completions"
    status, headers, raw = gateway.post("/v1/generate", {"model": "tiny", "input": "こんにちは"})
    answer = json.loads(raw)
    assert (status, answer["output"], answer["object"]) == (200, SAID, "chat.completion")
    trace = gateway.trace(headers["x-request-id"])
    assert trace["endpoint"] == "/v1/generate"
    assert trace["request"]["messages"] == [{"role": "user", "content": "こんにちは"}]


def test_a_stream_arrives_chunk_by_chunk_while_it_is_made(gateway, chat_body):
    started = time.monotonic()
    _, reply = open_stream(gateway, chat_body("slow"))
    times = []
    while line := reply.readline():
        if line.startswith(b"data:"):
            times.append(time.monotonic() - started)
    assert times[0] < 0.15
    assert times[-1] > 0.8
    gaps = [later - earlier for earlier, later in pairwise(times[:7])]
    assert min(gaps) > 0.05  # 0.15 s apart upstream: none was held back until the next one
    trace = gateway.trace(reply.headers["x-request-id"])
    assert trace["response"]["choices"][0]["message"] == {
        "role": "assistant",
        "reasoning_content": "考え",
        "content": SAID,
    }
    assert trace["response"]["choices"][0]["finish_reason"] == "stop"
    assert (trace["usage"]["total_tokens"], trace["stream"]["chunks"]) == (8, 8)  # the usage event is not sent on
    assert len(times) == 8  # seven events and [DONE]
    assert trace["stream"]["done"] is True


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_cancels_the_request_in_the_model_server(
    gateway, upstream, chat_body, wait_until, stream
):
    before, known = upstream.get("/seen")["cancelled"], {trace["trace_id"] for trace in gateway.traces()}
    if stream:
        connection, reply = open_stream(gateway, chat_body("hangs"))
        reply.readline()
        reply.close()
    else:
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port)
        connection.request("POST", "/v1/chat/completions", json.dumps(chat_body("hangs")))
        time.sleep(0.3)
    connection.close()
    wait_until(lambda: upstream.get("/seen")["cancelled"] == before + 1, 5)
    wait_until(lambda: len(gateway.traces()) == len(known) + 1, 5)
    trace = next(trace for trace in gateway.traces() if trace["trace_id"] not in known)
    assert (trace["status"], trace["http_status"], trace["error"]) == ("cancelled", 499, "the client hung up")
    if stream:
        assert trace["response"]["choices"][0]["message"]["reasoning_content"] == "考え"
        assert trace["stream"]["done"] is False


def test_an_upstream_error_keeps_status_headers_and_body(gateway):
    status, headers, answer = gateway.chat("error503")
    assert (status, headers["retry-after"]) == (503, "7")
    assert answer == {"error": {"message": "overloaded", "type": "x"}}
    trace = gateway.trace(headers["x-request-id"])
    assert (trace["status"], trace["http_status"], trace["error"]) == ("upstream_error", 503, "overloaded")
    assert gateway.chat()[0] == 200  # an error of one request opens no circuit


def test_a_server_that_dies_between_events_ends_the_stream_with_an_error_event(gateway, chat_body):
    _, reply = open_stream(gateway, chat_body("dies"))
    events = [line[6:] for line in reply.read().splitlines() if line.startswith(b"data: ")]
    assert json.loads(events[-1])["error"]["code"] == "upstream_broke_off"
    assert b"[DONE]" not in events
    trace = gateway.trace(reply.headers["x-request-id"])
    assert (trace["status"], trace["stream"]["done"]) == ("upstream_error", False)
    assert trace["response"]["choices"][0]["message"]["content"] == "祭り"


def test_a_server_that_dies_inside_an_event_is_no_clean_end(gateway, chat_body):
    _, reply = open_stream(gateway, chat_body("dies-inside"))
    with pytest.raises(http.client.IncompleteRead):
        reply.read()
    assert gateway.trace(reply.headers["x-request-id"])["status"] == "upstream_error"


def test_a_server_that_dies_inside_a_whole_answer_is_a_502(gateway):
    status, headers, answer = gateway.chat("dies-inside")
    assert (status, answer["error"]["code"]) == (502, "upstream_broke_off")
    assert gateway.trace(headers["x-request-id"])["status"] == "upstream_error"


def test_malformed_events_pass_through_and_are_counted(gateway, chat_body):
    _, reply = open_stream(gateway, chat_body("malformed"))
    assert reply.read().count(b"{not json") == 6
    trace = gateway.trace(reply.headers["x-request-id"])
    assert (trace["stream"]["malformed"], trace["status"]) == (6, "ok")
    assert trace["response"]["choices"][0]["message"]["content"] == SAID


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [(b"{", 400, "invalid_body"), (b"\xff{}", 400, "invalid_body"), (b" " * 100_001, 413, "body_too_large")],
)
def test_a_bad_body_is_refused_in_openais_shape_and_recorded(gateway, body, status, code):
    got, headers, raw = gateway.post("/v1/chat/completions", body)
    assert (got, json.loads(raw)["error"]["code"]) == (status, code)
    trace = gateway.trace(headers["x-request-id"])
    assert (trace["status"], trace["http_status"], trace["request"]) == ("error", status, None)


def test_a_chunked_body_can_not_outgrow_the_limit(gateway):
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port)
    pieces = (b" " * 10_000 for _ in range(11))
    connection.request(
        "POST", "/v1/chat/completions", pieces, encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
    )
    assert connection.getresponse().status == 413


def test_a_slow_body_gets_408(start_gateway, upstream):
    gateway = start_gateway(upstream.port, GATEWAY_BODY_TIMEOUT_S="0.3")
    with socket.create_connection(("127.0.0.1", gateway.port)) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert b" 408 " in client.recv(4096)


def test_unknown_routes_and_methods_answer_in_openais_shape(gateway):
    status, _, raw = gateway.post("/v1/nope", {})
    assert (status, json.loads(raw)["error"]["type"]) == (404, "not_found_error")
    status, _, raw = gateway.post("/health", {})
    assert (status, json.loads(raw)["error"]["code"]) == (405, "route_error")
    status, _, raw = gateway.post("/invocations", {"prompt": "x"})  # open on a bare vLLM
    assert status == 404


def test_models_health_and_ready(gateway):
    assert gateway.get("/v1/models")["data"][0]["id"] == "tiny"
    health = gateway.get("/health")
    assert (health["gateway"], health["vllm"], health["traces"]["lost"]) == ("ok", True, 0)
    assert gateway.get("/ready") == {"ready": True, "models": ["vllm"]}


def test_the_openai_client_works_whole_and_streamed(gateway, chat_body):
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="sk-secret-key", max_retries=0)
    whole = client.chat.completions.create(**chat_body())
    assert (whole.choices[0].message.content, whole.usage.total_tokens) == (SAID, 8)
    pieces = [
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**chat_body(), stream=True)
    ]
    assert "".join(pieces) == SAID
    assert client.completions.create(model="tiny", prompt="x").choices[0].text == SAID
    assert client.models.list().data[0].id == "tiny"
    with pytest.raises(openai.APIError, match="broke off"):
        list(client.chat.completions.create(**chat_body("dies"), stream=True))
    with pytest.raises(openai.InternalServerError, match="overloaded"):
        client.chat.completions.create(**chat_body("error503"))


def test_keys_and_texts_stay_out_of_logs_and_keys_out_of_traces(gateway, upstream, chat_body):
    body = chat_body(text="秘密の言葉", api_key="sk-in-the-body")
    status, headers, _ = gateway.post("/v1/chat/completions", body, {"authorization": "Bearer sk-in-the-header"})
    assert status == 200
    assert upstream.get("/seen")["requests"][-1]["headers"]["authorization"] == "Bearer sk-in-the-header"
    assert gateway.trace(headers["x-request-id"])["request"]["messages"][0]["content"] == "秘密の言葉"
    log, queue = gateway.log.read_text(), gateway.queue.read_text()
    assert not [word for word in ("sk-in-the", "秘密の言葉") if word in log]
    assert "sk-in-the" not in queue


def test_a_dead_vllm_is_answered_by_the_marked_message_and_its_return_is_noticed(
    start_gateway, start_upstream, unused_port, wait_until
):
    gateway = start_gateway(unused_port)
    assert gateway.get("/health") | {"traces": 0} == {"gateway": "ok", "vllm": False, "traces": 0}
    assert gateway.get("/ready") is None
    status, headers, answer = gateway.chat()
    assert (status, answer["model"], answer["tatara"]) == (200, "lite-maintenance", {"route": "maintenance"})
    assert (headers["x-tatara-route"], headers["x-tatara-reason"]) == ("maintenance", "vllm-down")
    trace = gateway.trace(headers["x-request-id"])
    assert (trace["route"], trace["reason"], trace["model"]) == ("maintenance", "vllm-down", "lite-maintenance")
    first = start_upstream(unused_port)
    wait_until(lambda: gateway.chat()[1]["x-tatara-route"] == "vllm", 5)
    first.stop(signal.SIGKILL)
    assert gateway.chat()[1]["x-tatara-route"] == "maintenance"
    start_upstream(unused_port)
    wait_until(lambda: gateway.chat()[1]["x-tatara-route"] == "vllm", 5)
    assert gateway.log.read_text().count("vllm is down") == 2  # once each time, not per request


def test_the_marked_message_streams_too(start_gateway, unused_port, chat_body):
    gateway = start_gateway(unused_port)
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0)
    chunks = list(client.chat.completions.create(**chat_body(), stream=True))
    assert "メンテナンス" in chunks[0].choices[0].delta.content
    assert (chunks[0].model, chunks[-1].choices[0].finish_reason) == ("lite-maintenance", "stop")


def test_without_fallback_a_dead_vllm_is_a_503_that_says_when_to_come_back(start_gateway, unused_port):
    gateway = start_gateway(unused_port, FALLBACK_ON_VLLM_DOWN="false")
    status, headers, answer = gateway.chat()
    assert (status, headers["retry-after"], answer["error"]["code"]) == (503, "1", "upstream_down")
    assert gateway.trace(headers["x-request-id"])["status"] == "error"


def test_a_server_that_closes_before_it_answers_counts_as_down(start_gateway, upstream):
    gateway = start_gateway(upstream.port)
    assert gateway.chat("dies-before")[1]["x-tatara-route"] == "maintenance"


def test_a_silent_server_is_a_504(start_gateway, upstream):
    gateway = start_gateway(upstream.port, GATEWAY_READ_TIMEOUT_S="0.3")
    status, headers, answer = gateway.chat("hangs")
    assert (status, answer["error"]["code"]) == (504, "timeout")
    assert gateway.trace(headers["x-request-id"])["http_status"] == 504


def test_short_prompts_go_to_lite_and_each_stands_in_for_the_other(start_gateway, start_upstream, upstream, wait_until):
    lite = start_upstream()
    gateway = start_gateway(upstream.port, LITE_MODEL=lite.url, LITE_API_KEY="lite-key", LITE_MODEL_NAME="small")
    status, headers, answer = gateway.chat("gpt-oss-20b", "短い")
    assert (status, headers["x-tatara-route"], answer["model"]) == (200, "lite", "small")
    assert lite.get("/seen")["requests"][-1]["headers"]["authorization"] == "Bearer lite-key"
    assert gateway.chat("gpt-oss-20b", "長" * 121)[1]["x-tatara-route"] == "vllm"
    lite.stop(signal.SIGKILL)
    headers = gateway.chat("gpt-oss-20b", "短い")[1]
    assert (headers["x-tatara-route"], headers["x-tatara-reason"]) == ("vllm", "lite-down")


def test_lite_stands_in_for_a_dead_vllm_and_is_asked_for_its_model(start_gateway, upstream, unused_port):
    gateway = start_gateway(unused_port, LITE_MODEL=upstream.url)
    _, headers, answer = gateway.chat("gpt-oss-20b", "長" * 121)
    assert (headers["x-tatara-route"], headers["x-tatara-reason"]) == ("lite", "vllm-down")
    assert answer["model"] == "tiny"
    assert gateway.get("/ready")["models"] == ["lite"]


def test_sigterm_lets_running_answers_finish(start_gateway, upstream, chat_body):
    gateway = start_gateway(upstream.port)
    _, reply = open_stream(gateway, chat_body("slow"))
    reply.readline()
    gateway.process.send_signal(signal.SIGTERM)
    assert reply.read().endswith(b"data: [DONE]\n\n")
    gateway.process.wait(10)
    assert gateway.traces()[-1]["status"] == "ok"


@pytest.mark.slow
def test_sigkill_under_load_loses_no_trace_of_an_answered_request(start_gateway, upstream, chat_body):
    async def load(gateway, answered):
        import aiohttp

        async def client(session):
            while True:
                body = chat_body(stream=len(answered) % 2 == 0)
                async with session.post(f"{gateway.url}/v1/chat/completions", json=body) as reply:
                    data = await reply.read()
                    if reply.status == 200 and (b"[DONE]" in data or data.startswith(b'{"id"')):
                        answered.append(reply.headers["x-request-id"])

        async with aiohttp.ClientSession() as session:
            clients = [asyncio.create_task(client(session)) for _ in range(16)]
            await asyncio.sleep(1.0)
            gateway.process.send_signal(signal.SIGKILL)
            await asyncio.gather(*clients, return_exceptions=True)

    gateway = start_gateway(upstream.port)
    answered = []
    asyncio.run(load(gateway, answered))
    recorded = [trace["trace_id"] for trace in gateway.traces()]
    assert len(answered) > 100
    assert set(answered) <= set(recorded)
    assert len(recorded) == len(set(recorded))
