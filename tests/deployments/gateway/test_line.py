"""The client's side of a connection, over raw sockets: what clients other than Python's send is answered, too."""

import contextlib
import json
import socket
import subprocess
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    ):
        for extra in (H2C + lines, lines + H2C, lines):
            said = summary(talk(gateway, start + extra + b"\r\n{}" + LAST))
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


LINES = st.sampled_from(
    [b"content-length: 2\r\n", b"content-length: 0\r\n", b"transfer-encoding: chunked\r\n", b"connection: close\r\n",
     b"connection: keep-alive\r\n", b"x: y\r\n", b"Transfer-Encoding: identity\r\n", b"expect: x\r\n", b"x\r\n"]
)  # fmt: skip
BODIES = st.sampled_from([b"", b"{}", b"2\r\n{}\r\n0\r\n\r\n", b"0\r\n\r\n", b"0\r\ntrailer: x\r\n\r\n", b"\r\n", b"{"])
STARTS = st.sampled_from([b"POST /v1/generate HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\n", b"PUT /x HTTP/1.0\r\n"])


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
    argv = ["curl", "-s", "--http2", "-d", '{"model": "m-7", "messages": []}', f"{gateway.url}/v1/chat/completions"]
    features = subprocess.run(["curl", "--version"], capture_output=True, text=True, check=True).stdout
    if "HTTP2" not in features:
        pytest.skip("this curl knows no HTTP/2")
    done = subprocess.run([*argv, "--next", *argv[1:]], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.count('"model": "m-7"') == 2
