"""Whatever a client or a model server sends: no 500, no hang, nothing left behind."""

import base64
import contextlib
import gzip
import json
import os
import shutil
import socketserver
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.needs import lack

pytestmark = pytest.mark.long

steady = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
OURS = {200, 204, 304, 404, 418, 500, 502, 503, 504}


class Parrot(socketserver.StreamRequestHandler):
    """Sends the bytes that the request's `model` holds in base64, whatever they are, and closes."""

    def handle(self):
        with contextlib.suppress(OSError, ValueError):
            size, first = 0, self.rfile.readline()
            while (line := self.rfile.readline()).strip():
                name, _, value = line.partition(b":")
                size = int(value) if name.lower() == b"content-length" else size
            if first.startswith(b"GET"):
                self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            else:
                self.wfile.write(base64.b64decode(json.loads(self.rfile.read(size))["model"]))


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """A gateway in front of a server that says whatever it is told."""
    from tests.deployments.gateway.conftest import Gateway

    socketserver.ThreadingTCPServer.allow_reuse_address = True
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Parrot)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder = tmp_path_factory.mktemp("parrot")
    gateway = Gateway(folder, server.server_address[1], FALLBACK_ON_VLLM_DOWN="false", GATEWAY_READ_TIMEOUT_S=2).start()
    yield gateway
    gateway.stop()
    server.shutdown()
    assert "Traceback" not in gateway.log.read_text()


def send(gateway, data, path="/v1/chat/completions", **more):
    body = {"model": base64.b64encode(data).decode(), "messages": [], **more}
    with contextlib.suppress(Exception):  # a cut answer is an answer too; the log tells of faults
        return gateway.post(path, body)[0]
    return 502


def check_idle(gateway, wait_until):
    wait_until(lambda: gateway.get("/health"), 5)
    text = subprocess.run(["curl", "-s", f"{gateway.url}/metrics"], capture_output=True, text=True, check=True).stdout
    assert "\ntatara_gateway_in_flight 0\n" in text
    assert '\ntatara_gateway_upstream_in_flight{upstream="vllm"} 0\n' in text


heads = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n",
        b"HTTP/1.1 418 \xe5\x96\x9d\r\ncontent-type: text/event-stream\r\nx-y: \xff\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\ncontent-length: 7\r\n\r\n",
        b"HTTP/1.1 700 Odd\r\ncontent-type: text/event-stream\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n",
        b"HTTP/1.1 200 OK\r\nx-tatara-route: forged\r\nset-cookie: a\r\nset-cookie: b\r\ncontent-length: 2\r\n\r\n",
        b"",
    ]
)
events = st.lists(
    st.sampled_from(
        [
            b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n', b"data: {not json\n\n", b"data: [DONE]\n\n",
            b'data: {"choices": 7, "usage": {"prompt_tokens": "many"}}\n\n', b"data: [1]\n\n", b": ping\n\n", b"\r\n\r\n",  # noqa: E501
            b'data: {"choices": [], "usage": {"total_tokens": 1}}\n\n', b"data: \xff\xfe\n\n", b"data: {\"cho", b"5\r\n",  # noqa: E501
            b'data: {"error": {"message": "m"}}\n\n', b"data: " + b"[" * 3000 + b"\n\n", b"\x00" * 50, b"event: x\n",
        ]
    ) | st.binary(max_size=60),
    max_size=8,
)  # fmt: skip


@steady
@given(heads, events, st.booleans(), st.sampled_from(["/v1/chat/completions", "/v1/responses", "/v1/generate"]))
def test_any_bytes_of_a_model_server_end_in_an_answer(parrot, head, pieces, stream, path):
    status = send(parrot, head + b"".join(pieces), path, stream=stream, input="x")
    assert status in OURS - {500}, status


def test_and_leave_nothing_behind(parrot, wait_until):
    send(parrot, b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + b"data: {\n\n" * 1000, stream=True)
    check_idle(parrot, wait_until)
    forged = b"HTTP/1.1 200 OK\r\nx-tatara-route: forged\r\ncontent-length: 2\r\n\r\n{}"
    body = {"model": base64.b64encode(forged).decode(), "messages": []}
    assert parrot.post("/v1/chat/completions", body)[1]["x-tatara-route"] == "vllm"


TEXT = {"model": "tiny", "messages": [{"role": "user", "content": "é祭"}]}


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(TEXT, ensure_ascii=False).encode("utf-16"),
        json.dumps(TEXT, ensure_ascii=False).encode("shift_jis", "replace"),
        b"\xef\xbb\xbf" + json.dumps(TEXT).encode(),
        gzip.compress(json.dumps(TEXT).encode(), mtime=0),
        b"", b"null", b"7", b'"text"', b"[]", b"{}{}", b'{"a": 1e400}', b'{"a": NaN}', b'{"a"', b"{" * 50_000,
        b'{"a":' * 19_000, b"[" * 90_000, b"9" * 90_000, b'{"model": ' + b"9" * 50_000 + b"}", b"\x00" * 100,
    ],
    ids=lambda body: repr(body[:12]),
)  # fmt: skip
def test_a_body_in_a_wrong_encoding_or_shape_is_a_400(gateway, body):
    for path in ("/v1/chat/completions", "/v1/generate", "/v1/responses"):
        status, headers, raw = gateway.post(path, body)
        assert (status, json.loads(raw)["error"]["code"]) == (400, "invalid_body"), raw
        assert headers["x-request-id"]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = ["messages", "prompt", "input", "stream", "stream_options", "tools", "logprobs", "max_tokens", "n", "stop"]


@steady
@given(st.dictionaries(st.sampled_from(NAMES), values, max_size=6), st.sampled_from(["chat/completions", "completions", "generate", "responses", "embeddings"]))  # fmt: skip  # noqa: E501
def test_any_json_object_is_answered(gateway, body, path):
    status, _, raw = gateway.post(f"/v1/{path}", {"model": "tiny", **body})
    assert status == 200 or (path == "generate" and status == 400), raw


def test_schemathesis_finds_no_fault(gateway, wait_until):
    """The gateway passes on what its schema does not allow; the model server decides, so that check is left out."""
    beside = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    program = shutil.which("schemathesis", path=os.pathsep.join(beside))
    if program is None:
        lack("no schemathesis: `make setup`")
    argv = [program, "run", f"{gateway.url}/openapi.json", "--max-examples", "8", "--request-timeout", "10"]
    argv += ["--exclude-checks", "negative_data_rejection,positive_data_acceptance", "--suppress-health-check", "all"]
    argv += ["--phases", "coverage,fuzzing", "--seed", "1", "--generation-database", ":memory:"]
    done = subprocess.run(argv, cwd=gateway.queue.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    check_idle(gateway, wait_until)
