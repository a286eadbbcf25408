"""Limits and ends: how many at once, how long, how large, and what a stop does to what runs."""

import asyncio
import http.client
import json
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import aiohttp
import pytest


def post_all(gateway, bodies, headers=()):
    """Send all at once; return (status, seconds, code or None, headers) in order."""

    async def one(session, body, header):
        began = time.monotonic()
        async with session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=header) as reply:
            answer = await reply.json(content_type=None)
            code = answer["error"]["code"] if "error" in answer else None
            return reply.status, time.monotonic() - began, code, reply.headers

    async def run():
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            given = list(headers) or [{}] * len(bodies)
            return await asyncio.gather(*(one(session, *pair) for pair in zip(bodies, given, strict=True)))

    return asyncio.run(run())


def test_more_than_its_places_wait_and_more_than_its_room_are_refused(start_gateway, upstream, chat_body):
    gateway = start_gateway(upstream.port, GATEWAY_MAX_CONCURRENT=2, GATEWAY_MAX_WAITING=2, GATEWAY_WAIT_S=5)
    found = post_all(gateway, [chat_body("slow")] * 6)  # each takes 0.5 s
    assert sorted(status for status, *_ in found) == [200] * 4 + [503] * 2
    assert sorted(seconds > 0.9 for status, seconds, *_ in found if status == 200) == [False, False, True, True]
    refused = [(code, headers["retry-after"]) for status, _, code, headers in found if status == 503]
    assert refused == [("overloaded", "1")] * 2
    assert gateway.chat()[0] == 200
    reasons = [(trace["reason"], trace["http_status"]) for trace in gateway.traces() if trace["http_status"] == 503]
    assert reasons == [("overloaded", 503)] * 2


def test_one_key_can_not_keep_another_waiting(start_gateway, upstream, chat_body, make_key, tmp_path):
    file = tmp_path / "keys.jsonl"
    greedy, modest = ({"authorization": f"Bearer {make_key(file, name)}"} for name in ("greedy", "modest"))
    gateway = start_gateway(upstream.port, GATEWAY_KEYS_FILE=file, GATEWAY_MAX_CONCURRENT=1, GATEWAY_MAX_WAITING=20)
    found = post_all(gateway, [chat_body("slow")] * 6, [greedy] * 5 + [modest])
    assert [status for status, *_ in found] == [200] * 6
    seconds = [second for _, second, *_ in found]
    assert sorted(seconds).index(seconds[-1]) <= 2  # next but one, though four of the other were there before


def test_a_client_that_hangs_up_while_it_waits_takes_no_place(start_gateway, upstream, chat_body, wait_until):
    gateway = start_gateway(upstream.port, GATEWAY_MAX_CONCURRENT=1, GATEWAY_MAX_WAITING=5)
    held = http.client.HTTPConnection("127.0.0.1", gateway.port)
    held.request("POST", "/v1/chat/completions", json.dumps(chat_body("hangs")))
    time.sleep(0.2)
    waiting = http.client.HTTPConnection("127.0.0.1", gateway.port)
    waiting.request("POST", "/v1/chat/completions", json.dumps(chat_body()))
    time.sleep(0.2)
    waiting.close()
    held.close()
    wait_until(lambda: len(gateway.traces()) == 2, 5)
    assert gateway.chat()[0] == 200
    assert [trace["status"] for trace in gateway.traces()] == ["cancelled", "cancelled", "ok"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_a_time_limit_in_all(start_gateway, upstream, chat_body, stream):
    gateway = start_gateway(upstream.port, GATEWAY_TOTAL_TIMEOUT_S="0.5")
    before = upstream.get("/seen")["cancelled"]
    if stream:
        with pytest.raises(http.client.IncompleteRead):
            gateway.post("/v1/chat/completions", chat_body("hangs", stream=True))
    else:
        status, _, answer = gateway.chat("hangs")
        assert (status, answer["error"]["code"]) == (504, "timeout")
    trace = gateway.traces()[-1]
    assert (trace["status"], trace["http_status"]) == ("error", 504)
    assert "longer than 0.5 s" in trace["error"]
    if stream:
        assert trace["response"]["choices"][0]["message"]["reasoning_content"] == "考え"
    deadline = time.monotonic() + 3
    while upstream.get("/seen")["cancelled"] == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert upstream.get("/seen")["cancelled"] == before + 1


def talk(port, data, *, half_close=False, timeout_s=5.0):
    """Send bytes; return all that comes until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as client:
        client.sendall(data)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        got = b""
        while piece := client.recv(65536):
            got += piece
        return got


def test_a_head_that_is_too_large_too_slow_or_no_http_is_refused(start_gateway, upstream):
    gateway = start_gateway(upstream.port, GATEWAY_MAX_HEADER_BYTES=8192, GATEWAY_BODY_TIMEOUT_S=1)
    whole = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 9000 + b"\r\ncontent-length: 2\r\n\r\n{}"
    endless = b"GET /health HTTP/1.1\r\nx: " + b"y" * 100_000
    many = b"GET /health HTTP/1.1\r\n" + b"".join(b"x-%d: y\r\n" % index for index in range(2000)) + b"\r\n"
    for data in (whole, endless, many):
        answer = talk(gateway.port, data)
        assert answer.startswith(b"HTTP/1.1 431 "), answer[:100]
        assert b'"headers_too_large"' in answer
    assert talk(gateway.port, b"\x16\x03\x01 no http\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    double = b"POST /v1/generate HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}"
    assert talk(gateway.port, double).startswith(b"HTTP/1.1 400 ")
    began = time.monotonic()
    assert talk(gateway.port, b"GET /health HT") == b""
    assert talk(gateway.port, b"") == b""
    assert time.monotonic() - began < 8
    assert gateway.chat()[0] == 200


def test_a_half_closed_socket_is_a_hang_up_and_leaks_nothing(start_gateway, upstream, wait_until):
    gateway = start_gateway(upstream.port)
    body = json.dumps({"model": "hangs", "messages": []}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: "
    talk(gateway.port, head + b"%d\r\n\r\n" % len(body) + body, half_close=True)
    talk(gateway.port, head + b"100\r\n\r\n{", half_close=True)
    wait_until(lambda: len(gateway.traces()) == 2, 5)
    assert {(trace["status"], trace["http_status"]) for trace in gateway.traces()} == {("cancelled", 499)}


@pytest.mark.parametrize("origin", ["", "origin: http://a.b\r\n", "connection: upgrade\r\nupgrade: h2c\r\n"])
def test_a_hang_up_is_told_to_the_request_in_turn_and_not_the_last_one_only(
    start_gateway, upstream, wait_until, origin
):
    gateway = start_gateway(upstream.port, GATEWAY_ALLOWED_ORIGINS="http://a.b")
    body = json.dumps({"model": "hangs", "messages": []})
    one = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n{origin}content-length: {len(body)}\r\n\r\n{body}".encode()
    with socket.create_connection(("127.0.0.1", gateway.port)) as client:
        client.sendall(one * 3)
        wait_until(lambda: gateway.get("/health") and upstream.get("/seen")["requests"], 5)
        time.sleep(0.3)
    wait_until(lambda: len(gateway.traces()) == 1, 5)
    assert [(trace["status"], trace["http_status"]) for trace in gateway.traces()] == [("cancelled", 499)]
    time.sleep(0.2)
    said = gateway.log.read_text()
    assert "Traceback" not in said
    assert "ASGI callable" not in said


def test_pipelined_requests_are_answered_in_order(gateway):
    body = b'{"model": "m-%d", "messages": []}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n%b\r\n"
    data = b"".join(head % (len(body % i), b"connection: close\r\n" if i == 2 else b"") + body % i for i in range(3))
    answer = talk(gateway.port, data)
    assert [answer.find(b'"model": "m-%d"' % index) > 0 for index in range(3)] == [True] * 3
    assert answer.find(b"m-0") < answer.find(b"m-1") < answer.find(b"m-2")


def test_a_client_that_does_not_read_makes_the_gateway_wait_not_grow(start_gateway, upstream):
    gateway = start_gateway(upstream.port)

    def rss_mb():
        return int(Path(f"/proc/{gateway.process.pid}/statm").read_text().split()[1]) * 4096 / 1e6

    before = rss_mb()
    body = json.dumps({"model": "pours", "messages": [], "stream": True}).encode()
    clients = []
    for _ in range(4):
        client = socket.create_connection(("127.0.0.1", gateway.port))
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        clients.append(client)
    time.sleep(1.0)  # 64 MB each would be there
    assert rss_mb() - before < 40
    for client in clients:
        client.close()


def test_a_stop_says_so_lets_answers_end_and_records_what_it_cuts(start_gateway, upstream, chat_body, wait_until):
    gateway = start_gateway(upstream.port, GATEWAY_DRAIN_DELAY_S=1, GATEWAY_SHUTDOWN_S=2)
    cut = http.client.HTTPConnection("127.0.0.1", gateway.port)
    cut.request("POST", "/v1/chat/completions", json.dumps(chat_body("hangs", stream=True)))
    cut.getresponse().readline()
    refused = []
    waiting = threading.Thread(target=lambda: refused.append(gateway.chat("hangs")))
    waiting.start()
    time.sleep(0.2)
    gateway.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert gateway.get("/ready") is None  # a load balancer sends nothing more
    assert gateway.get("/health")["gateway"] == "ok"
    assert gateway.chat()[0] == 200  # but what still comes is answered
    assert gateway.process.wait(10) == -signal.SIGTERM
    waiting.join(5)
    status, _, answer = refused[0]
    assert (status, answer["error"]["code"]) == (503, "stopping")
    traces = gateway.traces()
    assert sorted((trace["status"], trace["http_status"]) for trace in traces) == [
        ("cancelled", 499),
        ("cancelled", 503),
        ("ok", 200),
    ]
    partial = next(trace for trace in traces if trace["streamed"])
    assert partial["response"]["choices"][0]["message"]["reasoning_content"] == "考え"
    log = gateway.log.read_text()
    assert "Traceback" not in log, log


def test_several_servers_share_and_stand_in_for_each_other(start_gateway, start_upstream, upstream, wait_until):
    other = start_upstream()
    urls = f"{upstream.url}=50,{other.url}=50"
    gateway = start_gateway(upstream.port, VLLM_URL=urls)
    traces = [gateway.trace(gateway.chat()[1]["x-request-id"]) for _ in range(4)]
    assert {trace["route"] for trace in traces} == {"vllm"}
    health = gateway.get("/health")
    assert (health["vllm"], health["vllm-1"], health["vllm-2"]) == (True, True, True)
    other.stop(signal.SIGKILL)
    assert [gateway.chat()[0] for _ in range(8)] == [200] * 8  # connection refused: tried elsewhere, nobody sees it
    assert gateway.log.read_text().count("vllm-2 is down") <= 1
    wait_until(lambda: gateway.get("/health")["vllm-2"] is False, 5)
    assert gateway.get("/health")["vllm"] is True


def test_a_canary_gets_about_its_share(start_gateway, start_upstream, upstream):
    canary = start_upstream()
    gateway = start_gateway(upstream.port, VLLM_URL=f"{upstream.url}=80,{canary.url}=20")

    async def run():
        async with aiohttp.ClientSession() as session:
            for _ in range(300):
                body = {"model": "tiny", "messages": []}
                async with session.post(f"{gateway.url}/v1/chat/completions", json=body) as reply:
                    assert reply.status == 200

    asyncio.run(run())
    share = canary.get("/seen")["finished"] / 300
    assert 0.1 < share < 0.32  # 5 sigma around 0.2


def test_an_https_server_is_checked_and_reached(start_gateway, tmp_path, unused_port):
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    extensions = ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*argv, *extensions, *files], check=True, capture_output=True)
    import ssl
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"] or 0))
            self.send_response(200)
            self.send_header("content-length", "16")
            self.end_headers()
            self.wfile.write(b'{"model": "tls"}')

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", unused_port), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"https://localhost:{unused_port}"
    trusted = start_gateway(1, VLLM_URL=url, SSL_CERT_FILE=tmp_path / "cert.pem")
    for _ in range(2):
        status, _, answer = trusted.chat()
        assert (status, answer) == (200, {"model": "tls"})
    untrusted = start_gateway(1, VLLM_URL=url, FALLBACK_ON_VLLM_DOWN="false")
    assert untrusted.chat()[0] == 503
    assert "SSLCertVerificationError" in untrusted.log.read_text()
    server.shutdown()
