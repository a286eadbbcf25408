"""The client's side of a connection, over raw sockets: what clients other than Python's send is answered, too."""

import asyncio
import contextlib
import gzip
import json
import socket
import time

import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.gateway.line import LINE, ClientConnection
from deployments.gateway.server import Server

H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"  # Java's
LAST = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


def talk(gateway, *packets, timeout_s=5.0):
    """Send packets, a moment apart; return all that comes until the server closes."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=timeout_s) as client:
        for index, packet in enumerate(packets):
            time.sleep(0.05 if index else 0)
            client.sendall(packet)
        got = b""
        while piece := client.recv(65536):
            got += piece
        return got


def answers(data):
    """Return (status, headers, body) of each answer in what a server sent."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        size = int(headers.get("content-length", 0))
        body, data = data[:size], data[size:]
        found.append((int(status.split()[1]), headers, body))
    return found


def chat(model="m-0", extra=H2C, chunked=False):
    """Return head and body of a chat request."""
    body = json.dumps({"model": model, "messages": [], "text": "é" * 20}, ensure_ascii=False).encode()
    framing = b"transfer-encoding: chunked\r\n" if chunked else b"content-length: %d\r\n" % len(body)
    if chunked:
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (body[:9], body[9:])) + b"0\r\n\r\n"
    return b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n%b%b\r\n" % (extra, framing), body


def summary(data):
    """Return status and model (or error code) of each answer."""
    found = []
    for status, _, body in answers(data):
        said = json.loads(body) if body else {}
        found.append((status, said["error"]["code"] if "error" in said else said.get("model", "")))
    return found


@pytest.mark.parametrize("protocol", ["h2c", "foo", "websocket"])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_offer_of_another_protocol_is_ignored(gateway, protocol, chunked):
    """In one packet, in two, in pieces, beside other requests on the connection."""
    extra = H2C.replace(b"h2c", protocol.encode())
    head, body = chat("m-0", extra, chunked)
    want = [(200, "m-0"), (200, "")]
    assert summary(talk(gateway, head + body + LAST)) == want
    assert summary(talk(gateway, head, body, LAST)) == want
    assert summary(talk(gateway, head[:40], head[40:-1], head[-1:] + body[:1], body[1:-3], body[-3:] + LAST)) == want
    plain = b"".join(chat("m-1", b"x: y\r\n"))
    many = plain + head + body + b"".join(chat("m-2", extra, not chunked)) + plain + head + body + LAST
    models = ["m-1", "m-0", "m-2", "m-1", "m-0", ""]
    assert summary(talk(gateway, many)) == [(200, model) for model in models]
    middle = len(plain + head) + 3
    assert summary(talk(gateway, many[:middle], many[middle:])) == [(200, model) for model in models]
    seen = answers(talk(gateway, *chat("m-0", extra + b"expect: 100-continue\r\n", chunked), LAST))
    assert [status for status, *_ in seen] == [100, 200, 200]
    closing = extra.replace(b"Upgrade,", b"close, Upgrade,")
    assert summary(talk(gateway, *chat("m-0", closing, chunked), LAST)) == want[:1]


def test_also_without_a_body_and_in_http_1_0(gateway):
    get = b"GET /health HTTP/1.1\r\nhost: x\r\n%b\r\n"
    for extra in (H2C, H2C.replace(b"h2c", b"websocket") + b"sec-websocket-key: eA==\r\nsec-websocket-version: 13\r\n"):
        assert summary(talk(gateway, get % extra + LAST)) == [(200, "")] * 2
        there = get.replace(b"/health", b"/v1/chat/completions") % extra
        assert summary(talk(gateway, there + LAST)) == [(405, "route_error"), (200, "")]
    head, body = chat("m-0", b"x:\r\ny: \xff\t \r\n" + H2C)
    assert summary(talk(gateway, head.replace(b"HTTP/1.1", b"HTTP/1.0") + body)) == [(200, "m-0")]


def test_and_lets_nothing_be_smuggled(gateway):
    """What frames a body is judged as strictly as without the offer, and what is refused ends the connection."""
    start = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
    for lines in (
        b"content-length: 2\r\ncontent-length: 3\r\n",
        b"content-length: 2\r\ntransfer-encoding: chunked\r\n",
        b"transfer-encoding: chunked\r\ncontent-length: 2\r\n",
        b"transfer-encoding: gzip\r\n",
        b"transfer-encoding: chunked, gzip\r\n",
        b"transfer-encoding : chunked\r\n",
        b"content-length: +2\r\n",
        b"content-length: 2 \r\n x\r\n",
        b"x: y\r\n folded: z\r\n",
        b"x: y\x00\r\n",
        b"x: y\rcontent-length: 2\r\n",
        b"x: y\ncontent-length: 2\r\n",
        b"transfer-encoding: gzip, chunked\r\n",
        b"transfer-encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
    ):
        for extra in (H2C + lines, lines + H2C, lines):
            body = b"2\r\n{}\r\n0\r\n\r\n" if b"chunked\r\n" in extra else b"{}"
            said = summary(talk(gateway, start + extra + b"\r\n" + body + LAST))
            assert said == [(400, "bad_request")], (extra, said)
    for body in (
        b"5\r\n{}\r\n",
        b"0x2\r\n{}\r\n0\r\n\r\n",
        b"-1\r\n",
        b"g\r\n{}\r\n",
        b"2\n{}\n0\n\n",
        b"2\r\n{}xx0\r\n\r\n",
    ):
        said = summary(talk(gateway, start + H2C + b"transfer-encoding: chunked\r\n\r\n" + body + LAST))
        assert said == [(400, "bad_request")], (body, said)
    tunnel = b"CONNECT %b HTTP/1.1\r\nhost: x\r\n%b\r\n"
    for target in (b"x:443", b"/v1/chat/completions"):
        for extra in (b"", H2C, b"content-length: 2\r\n"):
            assert summary(talk(gateway, tunnel % (target, extra) + LAST, LAST)) == [(400, "bad_request")]
    large = H2C + b"".join(b"x-%d: %b\r\n" % (index, b"y" * 1000) for index in range(80))
    assert summary(talk(gateway, chat("m-0", large)[0])) == [(431, "headers_too_large")]


def test_http_1_1_asks_for_a_host_and_http_1_0_does_not(gateway):
    body = b"x: y\r\ncontent-length: 2\r\n\r\n{}"
    for extra in (b"", H2C, b"host-x: y\r\n"):
        for start in (b"GET /health", b"POST /v1/chat/completions"):
            assert summary(talk(gateway, start + b" HTTP/1.1\r\n" + extra + body + LAST)) == [(400, "bad_request")]
    assert summary(talk(gateway, b"GET /health HTTP/1.0\r\n\r\n")) == [(200, "")]
    late = b"GET /health HTTP/1.1\r\nx: y\r\nHost: x\r\n\r\n"
    assert summary(talk(gateway, b"GET /health HTTP/1.1\r\nhost:\r\n\r\n" + late + LAST)) == [(200, "")] * 3


LINES = st.sampled_from(
    [b"content-length: 2\r\n", b"content-length: 0\r\n", b"transfer-encoding: chunked\r\n", b"connection: close\r\n",
     b"connection: keep-alive\r\n", b"x: y\r\n", b"Transfer-Encoding: identity\r\n", b"expect: x\r\n", b"x\r\n"]
)  # fmt: skip
BODIES = st.sampled_from([b"", b"{}", b"2\r\n{}\r\n0\r\n\r\n", b"0\r\n\r\n", b"0\r\ntrailer: x\r\n\r\n", b"\r\n", b"{"])
STARTS = st.sampled_from(
    [b"POST /v1/generate HTTP/1.1\r\nhost: x\r\n", b"GET /health HTTP/1.1\r\nhost: x\r\n", b"PUT /x HTTP/1.0\r\n"]
)


@settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(STARTS, st.lists(LINES, max_size=3), BODIES), min_size=1, max_size=4), st.data())
def test_any_messages_are_taken_apart_as_without_the_offer(gateway, messages, data):
    """An `Upgrade` line changes nothing: the same answers, in number and kind, as with a line of no meaning."""
    sent = [b"", b""]
    for start, lines, body in messages:
        at = data.draw(st.integers(0, len(lines)))
        for index, line in enumerate(
            (b"connection: upgrade\r\nupgrade: h2c\r\n", b"connection: x\r\ngrade-up: h2c\r\n")
        ):
            sent[index] += start + b"".join([*lines[:at], line, *lines[at:]]) + b"\r\n" + body

    def ask(message):
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as client:
            client.sendall(message + LAST)
            got = b""
            with contextlib.suppress(TimeoutError):
                client.settimeout(0.2)
                while piece := client.recv(65536):
                    got += piece
        return summary(got)

    assert ask(sent[0]) == ask(sent[1])


def test_curl_asks_for_http_2_and_is_answered(gateway):
    """The bytes that curl 7.88.1 sends with --http2, twice on one connection."""
    body = b'{"model": "m-7", "messages": []}'
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8001\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n"
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
        b"Content-Length: %d\r\nContent-Type: application/x-www-form-urlencoded\r\n\r\n" % len(body)
    )
    assert summary(talk(gateway, head + body, head + body, LAST))[:2] == [(200, "m-7"), (200, "m-7")]


def test_a_stream_to_an_http_1_0_client_is_not_chunked_and_ends_with_the_connection(gateway):
    """nginx speaks HTTP/1.0 to what is behind it unless it is told otherwise."""
    body = b'{"model": "tiny", "messages": [], "stream": true}'
    head = b"POST /v1/chat/completions HTTP/1.0\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(body)
    answer = talk(gateway, head + body)
    head, _, events = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert events.startswith(b'data: {"id"')
    assert events.endswith(b"data: [DONE]\n\n")
    assert "Traceback" not in gateway.log.read_text()
    for ending in (b"", b"connection: keep-alive\r\n"):
        assert summary(talk(gateway, b"GET /health HTTP/1.0\r\n%b\r\n" % ending)) == [(200, "")]


def test_a_fault_in_what_follows_a_request_does_not_answer_it(gateway):
    """Two requests at once, the second none: a 400 now would be read as the first one's answer."""
    slow, quick = (b"".join(chat(model, b"")) for model in ("slow", "m-0"))
    large = b"GET /health HTTP/1.1\r\nx: " + b"y" * 200_000
    tunnel = b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n"
    for fault in (b"no http\r\n\r\n", tunnel, b"GET / HTTP/1.1\r\ncontent-length: -1\r\n\r\n" + LAST):
        assert summary(talk(gateway, slow + fault)) == [(200, "slow")]
        assert summary(talk(gateway, quick + fault)) == [(200, "m-0")]
    assert summary(talk(gateway, slow + large)) == [(200, "slow")]
    assert summary(talk(gateway, slow, b"no http\r\n\r\n", LAST)) == [(200, "slow")]
    broken = b"POST /v1/generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nno chunk\r\n"
    assert summary(talk(gateway, broken)) == [(400, "bad_request")]
    with contextlib.suppress(ConnectionResetError):
        assert talk(gateway, slow + broken) == b""  # not the first one's answer either


def test_trailers_are_bounded_and_no_headers(start_gateway, upstream, make_key, tmp_path):
    file = tmp_path / "keys.jsonl"
    key = b"authorization: Bearer %b\r\n" % make_key(file, "alice").encode()
    gateway = start_gateway(upstream.port, GATEWAY_KEYS_FILE=file, GATEWAY_MAX_HEADER_BYTES=8192)
    head, body = chat("m-0", b"", chunked=True)
    with_trailers = body[:-2] + key + b"x: y\r\n\r\n"
    assert summary(talk(gateway, head + with_trailers + LAST)) == [(401, "missing_api_key"), (200, "")]
    head = chat("m-0", key, chunked=True)[0]
    assert summary(talk(gateway, head + with_trailers + LAST)) == [(200, "m-0"), (200, "")]
    assert summary(talk(gateway, head, with_trailers[:-9], with_trailers[-9:] + LAST)) == [(200, "m-0"), (200, "")]
    for lines in (b"x: y\r\n" * 200, b"x" * 1000):
        with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", gateway.port)) as client:
            client.settimeout(5)
            client.sendall(head + body[:-2])
            for _ in range(20_000):
                client.sendall(lines)
            pytest.fail("trailers without end are taken")
    large = b"%x\r\n%b\r\n" % (50_000, b" " * 50_000)
    assert summary(talk(gateway, head, large[:7], large[7:20_000], large[20_000:] + body + LAST))[0] == (200, "m-0")


@pytest.mark.long
def test_what_stays_of_an_answered_body_has_a_time_limit(start_gateway, upstream):
    gateway = start_gateway(upstream.port, GATEWAY_BODY_TIMEOUT_S=1)
    head = b"POST /nowhere HTTP/1.1\r\nhost: x\r\n"
    for packets in (
        (head + b"content-length: 9\r\n\r\n", b"1234"),
        (head + b"content-length: 9\r\n\r\n1234",),  # it is here before the answer
        (head + b"content-length: 9\r\n\r\n",),
        (head + b"transfer-encoding: chunked\r\n\r\n", b"4\r\n12"),
        (b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", b"\r\n"),
    ):
        began = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert len(answers(talk(gateway, *packets, timeout_s=8))) == 1
        assert time.monotonic() - began < 6


@pytest.mark.long
def test_a_connection_whose_body_came_whole_behind_its_answer_is_idle_and_not_slow(start_gateway, upstream):
    gateway = start_gateway(upstream.port, GATEWAY_BODY_TIMEOUT_S=1)
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as client:
        client.sendall(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n1234")
        first = client.recv(65536)
        client.sendall(b"56789")
        time.sleep(3.5)
        client.sendall(LAST)
        assert [status for status, *_ in answers(first + b"".join(iter(lambda: client.recv(65536), b"")))] == [404, 200]


@pytest.mark.long
def test_but_a_client_may_read_its_answer_as_slowly_as_it_likes(start_gateway, upstream):
    gateway = start_gateway(upstream.port, GATEWAY_BODY_TIMEOUT_S=1)
    body = b'{"input": [%b1]}' % (b"1," * 200_000)
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", gateway.port))
        client.sendall(head + body)
        time.sleep(3.5)
        got = b"".join(iter(lambda: client.recv(1 << 20), b""))
    (status, _, answer), *_ = answers(got)
    assert (status, len(json.loads(answer)["data"])) == (200, 200_001)


def test_head_is_get_without_a_body(gateway):
    for path, status in (("/health", 200), ("/v1/models", 200), ("/v1/chat/completions", 405), ("/nowhere", 404)):
        answer = talk(gateway, b"HEAD %b HTTP/1.1\r\nhost: x\r\n\r\n" % path.encode() + LAST)
        first, _, rest = answer.partition(b"\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 %d " % status), first
        assert summary(rest) == [(200, "")]
    gateway_says = talk(gateway, b"HEAD /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert b"content-length: 83\r\n" in gateway_says


def test_a_compressed_body_is_refused_by_its_name(gateway):
    body = gzip.compress(b'{"model": "m-0", "messages": []}')
    status, headers, raw = gateway.post("/v1/chat/completions", body, {"content-encoding": "gzip"})
    assert (status, json.loads(raw)["error"]["code"]) == (415, "unsupported_encoding")
    assert headers["accept-encoding"] == "identity"
    assert gateway.post("/v1/chat/completions", b"{", {"content-encoding": "identity"})[0] == 400


async def say_ok(scope, receive, send):
    """An application that answers, at /slow after four seconds."""
    await asyncio.sleep(4 if scope["path"] == "/slow" else 0)
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


@contextlib.asynccontextmanager
async def connected(idle_s):
    """A connection to a server of ours, in this process, that is closed when it is idle for so long."""
    config = uvicorn.Config(
        say_ok, http=ClientConnection, loop="asyncio", lifespan="off", log_config=None, timeout_keep_alive=idle_s
    )
    server = Server(config, 0.0, lambda: None)
    listener = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve([listener]))
    yield await asyncio.open_connection(*listener.getsockname())
    server.should_exit = True
    await serving


def test_an_idle_connection_is_closed_after_its_time_and_not_before():
    async def run():
        async with connected(2) as (reader, writer):
            for pause_s in (1.2, 1.2, 0.0):  # it counts from the latest answer
                writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                assert b"200 OK" in await reader.readuntil(b"ok")
                await asyncio.sleep(pause_s)
            began = time.monotonic()
            assert await asyncio.wait_for(reader.read(), 8) == b""
            assert 1.5 < time.monotonic() - began < 6

    asyncio.run(run())


@pytest.mark.long
@pytest.mark.parametrize(
    "packets",
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /slow HTTP/1.1\r\nhost: x\r\n" + H2C + b"\r\n"),
        (
            b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n1234",
            b"56789GET /slow HTTP/1.1\r\nhost: x\r\n\r\n",
        ),
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\nGET /slow HT", b"TP/1.1\r\nhost: x\r\n\r\n"),
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\nGET /slow HTTP/1.1\r\nhost: x\r\n\r\n",),
    ],
)
def test_a_connection_is_not_idle_while_a_request_of_it_is_answered(packets):
    async def run():
        async with connected(1) as (reader, writer):
            for packet in packets:
                writer.write(packet)
                await asyncio.sleep(0.2)
            got = await asyncio.wait_for(reader.read(), 12)  # until it is idle
        return [body for *_, body in answers(got)]

    assert asyncio.run(run()) == [b"ok", b"ok"]


@pytest.mark.long
def test_a_part_of_the_next_head_does_not_cut_an_answer_that_takes_longer_than_a_head_may(start_gateway, upstream):
    gateway = start_gateway(upstream.port, GATEWAY_BODY_TIMEOUT_S=1, GATEWAY_READ_TIMEOUT_S=4)
    slow, quick = (b"".join(chat(model, b"")) for model in ("hangs", "m-0"))
    with_chunks = b"".join(chat("m-1", b"", chunked=True))
    cut = with_chunks.index(b"9\r\n") + 3
    for packet, rest, models in (
        (slow + LAST[:9], LAST[9:], []),
        (slow + quick + LAST[:9], LAST[9:], ["m-0"]),
        (slow + with_chunks[:cut], with_chunks[cut:] + LAST, ["m-1"]),
    ):
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as client:
            client.sendall(packet)
            first = client.recv(65536)
            client.sendall(rest)
            said = summary(first + b"".join(iter(lambda: client.recv(65536), b"")))
        assert said == [(504, "timeout"), *((200, model) for model in (*models, ""))]
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as client, contextlib.suppress(OSError):
        client.sendall(quick + LAST[:9])  # and after the answer it has its time
        began = time.monotonic()
        assert b"m-0" in b"".join(iter(lambda: client.recv(65536), b""))
        assert 0.9 < time.monotonic() - began < 6


def test_what_comes_after_an_answer_was_promised_waits_for_it():
    class Told(asyncio.Transport):
        """Takes what is written; a socket would hide the moment at which it is."""

        def __init__(self):
            super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
            self.got, self.is_cut = b"", False

        def write(self, data):
            self.got += data

        def is_closing(self):
            return self.is_cut

        def close(self):
            self.is_cut = True

        def resume_reading(self):
            pass

    async def promise_and(then):
        promised = []

        async def app(scope, receive, send):
            line = scope["extensions"][LINE]
            assert line.take_body(scope) == b"{}"
            promised.append(line.promise(scope, 200, [(b"x-y", b"z")], b"answer", lambda: promised[0]()))
            assert line.promise(scope, 200, [], b"another", bool) is None

        config = uvicorn.Config(app, http=ClientConnection, lifespan="off", log_config=None, loop="asyncio")
        config.load()
        line, transport = ClientConnection(config, uvicorn.server.ServerState(), {}), Told()
        line.connection_made(transport)
        line.data_received(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
        await asyncio.sleep(0.01)
        assert (len(promised), transport.got) == (1, b"")
        then(line)
        if not transport.got:  # nothing asked for it
            promised[0]()
        return transport.got

    def half_close(line):
        assert not line.eof_received()  # as asyncio and uvloop do it
        line.transport.close()

    def lose(line):
        line.transport._transport.is_cut = True
        line.connection_lost(ConnectionResetError())

    whole = b"x-y: z\r\n\r\nanswer"
    assert asyncio.run(promise_and(bool)).endswith(whole)
    said = asyncio.run(promise_and(lambda line: line.data_received(b"no http\r\n\r\n")))
    assert 0 < said.find(whole) < said.find(b" 400 ")
    assert asyncio.run(promise_and(ClientConnection.shutdown)).endswith(whole)
    assert asyncio.run(promise_and(half_close)).endswith(whole)
    assert asyncio.run(promise_and(lose)) == b""
