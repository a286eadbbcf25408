"""What the drain sends is what Weave's own server takes, keeps and shows: ids, times, chat, cost, failures."""

import base64
import random
import time
from pathlib import Path

import httpx
import pytest

from tasks.traces.calls import call
from tasks.traces.queue import FileQueue
from tasks.traces.record import iso_from_us, us_from_iso, uuid7
from tasks.traces.run import drain_traces, sink_from_environment
from tasks.traces.spec import DrainSpec

pytestmark = [pytest.mark.weave, pytest.mark.timeout(180)]
SPEC = DrainSpec(batch_records=10, grace_s=0.2, request_timeout_s=30)
UPSTREAM = Path(__file__).parents[1] / "deployments" / "gateway" / "upstream_server.py"


@pytest.fixture
def sent(queue, weave):
    """Queue records, drain them into the server, and return what it then holds: {id: call}."""

    def send(*records):
        queue.append(record.to_line() for record in records)
        report = drain_traces(queue, sink_from_environment(SPEC, weave.environment()), SPEC)
        assert (report.status, report.num_dead, report.num_waiting) == ("drained", 0, 0), report.failures
        assert weave.rows() == {record.trace_id: 1 for record in records}
        return {id: only for id, (only,) in weave.calls().items()}

    return send


def test_the_server_keeps_every_copy_so_a_double_would_show(weave, make_record):
    batch = [call(make_record(n), weave.project_id, 3 << 20) for n in range(5)]
    for _ in range(3):
        reply = weave.client.post(f"/v2/{weave.project_id}/calls/complete", json={"batch": batch})
        assert reply.status_code == 200, reply.text
    assert sorted(weave.rows().values()) == [3] * 5
    assert weave.count() == 15
    assert sorted(len(calls) for calls in weave.calls().values()) == [3] * 5
    assert sorted(len(calls) for calls in weave.calls(latest_only=True).values()) == [1] * 5


def test_every_call_is_there_once_with_its_own_id_and_exact_times(sent, weave, make_record):
    records = [make_record(n) for n in range(25)]
    found = sent(*records)
    assert weave.count() == 25
    assert len(weave.calls(latest_only=True)) == 25
    for record in records:
        kept = found[record.trace_id]
        assert (kept["started_at"], kept["ended_at"]) == (record.started_at, record.ended_at)
        assert (kept["trace_id"], kept["op_name"]) == (record.trace_id, "gateway.chat.completions")
        assert kept["attributes"]["tatara"]["first_token_at"] == record.first_token_at
    assert weave.told()["num_calls"] == [10, 10, 5]


@pytest.mark.parametrize("start_us", [0, 1, 951_782_399_999_999, 4_294_967_296_000_001])
def test_a_clock_that_jumped_is_kept_as_it_was(sent, make_record, start_us):
    times = {"started_at": iso_from_us(start_us), "ended_at": iso_from_us(start_us + 1)}
    record = make_record(1, trace_id=uuid7(start_us, 1), first_token_at=None, **times)
    kept = sent(record)[record.trace_id]
    assert [us_from_iso(kept[name]) for name in ("started_at", "ended_at")] == [start_us, start_us + 1]


def test_the_chat_view_gets_messages_and_choices_in_openais_shape(sent, make_record):
    tool_call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": "京都"}'}}
    messages = [
        {"role": "system", "content": "簡潔に。"},
        {"role": "user", "content": "a\u0000b 'quoted' {braces} \u2028 ${x} 🏮"},
        {"role": "assistant", "content": None, "tool_calls": [tool_call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "晴れ"},
    ]
    answer = {"index": 0, "message": {"role": "assistant", "content": "晴れです"}, "finish_reason": "stop"}
    record = make_record(
        1, request={"model": "tiny", "messages": messages, "temperature": 0.1}, response={"choices": [answer]}
    )
    kept = sent(record)[record.trace_id]
    assert kept["inputs"]["messages"] == messages
    assert kept["inputs"]["temperature"] == 0.1
    assert kept["output"]["choices"] == [answer]
    assert kept["summary"]["weave"]["status"] == "success"


def test_usage_costs_what_the_project_says(sent, weave, make_record):
    prices = {"tiny": {"prompt_token_cost": 0.5, "completion_token_cost": 2.0}}
    weave.ask("/cost/create", costs=prices)
    record, known = make_record(7), make_record(8, model="gpt-4o")
    found = sent(record, known)
    usage = found[record.trace_id]["summary"]["usage"]
    assert usage == {"tiny": {"requests": 1, "prompt_tokens": 1000, "completion_tokens": 7, "total_tokens": 1007}}
    (priced,) = weave.calls(include_costs=True)[record.trace_id]
    cost = priced["summary"]["weave"]["costs"]["tiny"]
    assert (cost["prompt_tokens_total_cost"], cost["completion_tokens_total_cost"]) == (500.0, 14.0)
    (listed,) = weave.calls(include_costs=True)[known.trace_id]  # a model whose price the server brings along
    assert listed["summary"]["weave"]["costs"]["gpt-4o"]["prompt_tokens_total_cost"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "upstream_error", "http_status": 503, "error": "vLLM answered 503: overloaded"},
        {"status": "error", "http_status": 500, "error": "half a pair: \ud800", "response": None},
        {"status": "cancelled", "http_status": 499, "error": None, "response": None, "usage": None},
    ],
)
def test_a_failure_shows_as_one(sent, make_record, changes):
    record = make_record(1, **changes)
    kept = sent(record)[record.trace_id]
    assert kept["summary"]["weave"]["status"] == "error"
    assert kept["exception"]
    assert kept["summary"]["status_counts"] == {"success": 0, "error": 1}
    assert kept["attributes"]["tatara"]["http_status"] == changes["http_status"]


def test_a_large_picture_becomes_content_of_its_own_and_the_call_is_one(sent, make_record):
    pixels = b"\x89PNG\r\n\x1a\n" + random.Random(1).randbytes(600_000)
    url = f"data:image/png;base64,{base64.b64encode(pixels).decode()}"
    content = [{"type": "text", "text": "何?"}, {"type": "image_url", "image_url": {"url": url}}]
    record = make_record(1, request={"messages": [{"role": "user", "content": content}]})
    kept = sent(record)[record.trace_id]["inputs"]["messages"][0]["content"]
    assert kept[0] == content[0]
    assert kept[1]["image_url"]["url"].startswith("weave:///team/")


def test_what_a_real_gateway_wrote_arrives_as_it_happened(weave, start_process, free, python, tmp_path):
    traces = tmp_path / "traces.jsonl"
    url = _start_gateway(start_process, free, python, traces, weave)
    _post(url, model="tiny")
    _post(url, model="tiny", stream=True, stream_options={"include_usage": True})
    _post(url, model="error503")
    with pytest.raises(httpx.TransportError):
        _post(url, model="hangs", stream=True, timeout=1.0)
    deadline = time.monotonic() + 20
    while len(traces.read_bytes().splitlines()) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    queue = FileQueue(traces)
    report = drain_traces(queue, sink_from_environment(SPEC, weave.environment()), SPEC)
    queue.close()
    assert (report.num_delivered, report.num_dead) == (4, 0)
    whole, streamed, refused, cancelled = sorted(
        (only for (only,) in weave.calls().values()), key=lambda kept: kept["started_at"]
    )
    assert sorted(weave.rows().values()) == [1] * 4
    for kept in (whole, streamed):
        assert kept["inputs"]["messages"] == [{"role": "user", "content": "こんにちは"}]
        assert kept["output"]["choices"][0]["message"]["content"] == "祭りは fun!"
        assert kept["summary"]["usage"]["tiny"] == {
            "requests": 1,
            "prompt_tokens": 3,
            "completion_tokens": 5,
            "total_tokens": 8,
        }
        assert kept["summary"]["weave"]["status"] == "success"
    assert [kept["summary"]["weave"]["status"] for kept in (refused, cancelled)] == ["error", "error"]
    assert [kept["attributes"]["tatara"]["status"] for kept in (refused, cancelled)] == ["upstream_error", "cancelled"]


def _start_gateway(start_process, free_port, python, traces, weave):
    upstream, port = free_port(), free_port()
    environment = weave.environment()
    start_process([python, str(UPSTREAM), str(upstream)], f"http://127.0.0.1:{upstream}/health", environment)
    environment |= {
        "VLLM_URL": f"http://127.0.0.1:{upstream}",
        "LITE_GATEWAY_PORT": str(port),
        "FILE_QUEUE_PATH": str(traces),
    }
    start_process([python, "-m", "deployments.gateway"], f"http://127.0.0.1:{port}/health", environment)
    return f"http://127.0.0.1:{port}"


def _post(url, *, timeout=30.0, **body):
    body |= {"messages": [{"role": "user", "content": "こんにちは"}]}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=timeout).text
