"""Routes beside chat: responses, embeddings, metrics, the OpenAPI schema, and what must not be reachable."""

import http.client
import json

import openai
import pytest

SAID = "祭りは fun!"


@pytest.fixture(scope="module")
def client(gateway):
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0)


def test_responses_whole_and_streamed_with_the_openai_client(gateway, client):
    whole = client.responses.with_raw_response.create(model="tiny", input="こんにちは")
    assert whole.parse().output_text == SAID
    assert (whole.headers["x-tatara-route"], whole.headers["x-tatara-reason"]) == ("vllm", "responses")
    trace = gateway.trace(whole.headers["x-request-id"])
    assert (trace["endpoint"], trace["usage"]["output_tokens"]) == ("/v1/responses", 5)
    events = list(client.responses.create(model="tiny", input="こんにちは", stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == SAID
    assert events[-1].response.output_text == SAID
    traces = [trace for trace in gateway.traces() if trace["endpoint"] == "/v1/responses"]
    assert traces[-1]["response"]["status"] == "completed"
    assert (traces[-1]["usage"]["total_tokens"], traces[-1]["stream"]["done"]) == (8, True)


def test_a_cut_stream_of_responses_keeps_what_came(gateway):
    status, headers, raw = gateway.post("/v1/responses", {"model": "cut", "input": "x", "stream": True})
    assert (status, b"upstream_broke_off" in raw) == (200, True)
    trace = gateway.trace(headers["x-request-id"])
    assert (trace["status"], trace["stream"]["done"]) == ("upstream_error", False)
    assert trace["response"]["output"][0]["content"][0]["text"] == SAID


def test_embeddings_with_the_openai_client(gateway, client):
    made = client.embeddings.create(model="tiny", input=["a", "b"], encoding_format="float")
    assert [item.embedding for item in made.data] == [[0.5, -1.0], [0.5, -1.0]]
    traces = [trace for trace in gateway.traces() if trace["endpoint"] == "/v1/embeddings"]
    assert (traces[-1]["reason"], traces[-1]["usage"]["prompt_tokens"]) == ("embeddings", 3)


def test_responses_and_embeddings_have_no_maintenance_message(start_gateway, unused_port):
    gateway = start_gateway(unused_port)
    for path in ("/v1/responses", "/v1/embeddings"):
        status, headers, raw = gateway.post(path, {"model": "tiny", "input": "x"})
        assert (status, json.loads(raw)["error"]["code"], headers["retry-after"]) == (503, "upstream_down", "1")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/invocations", 404), ("/tokenize", 404), ("/detokenize", 404), ("/pooling", 404), ("/classify", 404),
        ("/score", 404), ("/v1/score", 404), ("/rerank", 404), ("/v1/audio/transcriptions", 404), ("/version", 404),
        ("/v1/load_lora_adapter", 404), ("/sleep", 404), ("/reset_prefix_cache", 404), ("/collective_rpc", 404),
        ("/v1/responses/resp_1/cancel", 404), ("/v1/chat/completions/", 404), ("//v1/chat/completions", 404),
        ("/v1/../invocations", 404), ("/v1/%2e%2e/invocations", 404), ("/ping", 404), ("/server_info", 404),
        ("/docs", 404), ("/health", 405), ("/metrics", 405),
    ],
)  # fmt: skip
def test_nothing_else_of_vllm_is_reachable(gateway, upstream, path, status):
    before = len(upstream.get("/seen")["requests"])
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port)
    connection.request("POST", path, json.dumps({"model": "tiny", "prompt": "x"}), {"content-type": "application/json"})
    reply = connection.getresponse()
    body = json.loads(reply.read())
    assert (reply.status, body["error"]["code"]) == (status, "route_error")
    assert len(upstream.get("/seen")["requests"]) == before


def test_usage_is_asked_for_and_shown_only_to_who_asked(gateway, upstream, chat_body):
    def stream(**more):
        status, headers, raw = gateway.post("/v1/chat/completions", chat_body(stream=True, **more))
        assert status == 200
        events = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith(b"data: {")]
        assert raw.endswith(b"data: [DONE]\n\n")
        assert gateway.trace(headers["x-request-id"])["usage"]["total_tokens"] == 8
        return [event["usage"] for event in events if event.get("usage")]

    assert stream() == []
    assert upstream.get("/seen")["requests"][-1]["body"]["stream_options"] == {"include_usage": True}
    assert stream(stream_options=None) == stream(stream_options={"include_usage": False}) == []
    assert stream(stream_options={"include_usage": True}) == [
        {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    ]


def test_metrics_tell_what_happened(gateway, chat_body):
    def metrics():
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port)
        connection.request("GET", "/metrics")
        reply = connection.getresponse()
        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        lines = reply.read().decode().splitlines()
        assert all(line.startswith("#") or len(line.rsplit(" ", 1)) == 2 for line in lines)
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = metrics()
    gateway.chat()
    gateway.post("/v1/chat/completions", b"{")
    after = metrics()
    chat = 'endpoint="/v1/chat/completions"'
    for name, more in (
        (f'tatara_gateway_requests_total{{{chat},route="vllm",status="200"}}', 1),
        (f'tatara_gateway_requests_total{{{chat},route="none",status="400"}}', 1),
        (f"tatara_gateway_request_seconds_count{{{chat}}}", 2),
        (f'tatara_gateway_request_seconds_bucket{{{chat},le="+Inf"}}', 2),
        (f"tatara_gateway_first_token_seconds_count{{{chat}}}", 1),
        ('tatara_gateway_tokens_total{kind="completion"}', 5),
        ('tatara_gateway_rejected_total{reason="invalid_body"}', 1),
        ("tatara_gateway_traces_written", 2),
    ):
        assert after[name] - before.get(name, 0) == more, name
    assert after['tatara_gateway_upstream_up{upstream="vllm"}'] == 1
    assert (after["tatara_gateway_in_flight"], after["tatara_gateway_waiting"]) == (0, 0)
    assert 1e7 < after["process_resident_memory_bytes"] < 1e9


def test_the_openapi_schema_describes_the_hot_routes(gateway):
    paths = gateway.get("/openapi.json")["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/generate"} <= set(paths)
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert (body["required"], "tools" in body["properties"]) == (["model", "messages"], True)


def test_every_answer_leads_back_to_model_adapter_and_run(start_gateway, upstream):
    ids = {"model-digest": "sha256:aa", "adapter-digest": "sha256:bb", "run-id": "0198-run"}
    gateway = start_gateway(
        upstream.port, **{f"TATARA_{name.replace('-', '_').upper()}": value for name, value in ids.items()}
    )
    _, headers, _ = gateway.post("/v1/chat/completions", {"model": "tiny", "messages": []})
    assert {name: headers[f"x-tatara-{name}"] for name in ids} == ids
    trace = gateway.trace(headers["x-request-id"])
    assert (trace["model_digest"], trace["adapter_digest"], trace["run_id"]) == ("sha256:aa", "sha256:bb", "0198-run")
    _, headers, _ = gateway.post("/v1/chat/completions", b"{")  # no model wrote this
    assert not [name for name in ids if f"x-tatara-{name}" in headers]
    assert gateway.trace(headers["x-request-id"])["model_digest"] is None
