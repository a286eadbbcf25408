"""HTTP/1.1 towards the model server: real sockets, a server that sends the bytes it is told to."""

import asyncio
import contextlib
import socket
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.gateway.pool import KEEPALIVE_S, ConnectFailedError, Pool
from deployments.gateway.wire import MAX_HEAD_BYTES, BrokenReplyError, SilentServerError

ASK = b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
steady = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])


class Script:
    """A server; each request gets the next of `answers`: pieces of bytes, numbers to sleep, CLOSE or RESET."""

    CLOSE, RESET = "close", "reset"

    def __init__(self, *answers):
        self.answers = list(answers)
        self.num_connections = self.num_asked = self.num_lost = 0

    async def _serve(self, reader, writer):
        self.num_connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                self.num_asked += 1
                for piece in self.answers.pop(0) if self.answers else ():
                    if piece == self.CLOSE:
                        writer.close()
                        return
                    if piece == self.RESET:
                        writer.transport.abort()
                        return
                    if isinstance(piece, float):
                        await asyncio.sleep(piece)
                    else:
                        writer.write(piece)
                        await writer.drain()
        self.num_lost += 1
        writer.close()

    @contextlib.asynccontextmanager
    async def pool(self):
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        pool = Pool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", 1.0)
        try:
            yield pool
        finally:
            pool.close()
            server.close()


def ask(*answers, times=1, read=True):
    """Return (status, headers, body) of each of `times` requests, and the server."""
    script = Script(*answers)

    async def run():
        found = []
        async with script.pool() as pool:
            for _ in range(times):
                reply = await pool.ask(ASK)
                found.append((reply.status, dict(reply.headers), await reply.read() if read else b""))
                for _ in range(2):  # a late loop has run the server's timers after the first, and read after the second
                    await asyncio.sleep(0.005)
        return found

    return asyncio.run(asyncio.wait_for(run(), 10)), script


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        ([OK + b"Content-Length: 5\r\n\r\nhello"], b"hello"),
        ([OK + b"content-length: 5\r\n\r\n", 0.01, b"hel", 0.01, b"lo"], b"hello"),
        ([OK + b"transfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\ntrailer: x\r\n\r\n"], b"hello"),
        ([OK + b"\r\nhello", Script.CLOSE], b"hello"),  # ends with the connection
        ([b"HTTP/1.0 200 OK\r\n\r\nhello", Script.CLOSE], b"hello"),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], b""),
        ([b"HTTP/1.1 103 Early\r\nlink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + OK + b"content-length: 0\r\n\r\n"], b""),  # noqa: E501
    ],
)  # fmt: skip
def test_each_way_to_end_a_body(answer, body):
    [(status, headers, got)], _ = ask(answer)
    assert (status in (200, 204), got) == (True, body)
    assert "link" not in {name.decode() for name in headers}


@steady
@given(st.lists(st.integers(1, 120), max_size=6), st.lists(st.binary(min_size=1, max_size=40), max_size=4))
def test_an_answer_is_the_same_however_the_network_cuts_it(cuts, chunks):
    data = OK + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    data += b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    places = [0, *sorted(cut for cut in set(cuts) if cut < len(data)), len(data)]
    pieces = [item for i, j in pairwise(places) for item in (data[i:j], 0.001)]
    [(status, headers, body)], _ = ask(pieces)
    assert (status, headers, body) == (
        200,
        {b"content-type": b"text/event-stream", b"transfer-encoding": b"chunked"},
        b"".join(chunks),
    )


def test_a_connection_serves_again_only_after_a_whole_answer_that_keeps_it():
    whole = [OK + b"content-length: 2\r\n\r\nhi"]
    _, script = ask(whole, whole, whole, times=3)
    assert (script.num_connections, script.num_asked) == (1, 3)
    for ending in (
        [OK + b"connection: close\r\ncontent-length: 2\r\n\r\nhi"],
        [OK + b"content-length: 2\r\n\r\nhi and more"],
        [OK + b"content-length: 2\r\n\r\nhi", 0.002, b"HTTP/1.1 500 Smuggled\r\ncontent-length: 0\r\n\r\n"],
        [b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi"],
    ):
        found, script = ask(ending, whole, times=2)
        assert [body for _, _, body in found] == [b"hi", b"hi"]
        assert script.num_connections == 2, ending


@pytest.mark.parametrize(
    "answer",
    [
        [b"SSH-2.0-OpenSSH_9.6\r\n"],
        [OK + b"content-length: 10\r\n\r\nhel", Script.CLOSE],
        [OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhel", Script.CLOSE],
        [OK + b"transfer-encoding: chunked\r\n\r\nxyz\r\n"],
        [OK + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"],
        [OK + b"content-length: 1\r\ncontent-length: 2\r\n\r\nhi"],
        [OK, Script.RESET],
        [Script.CLOSE],
        [OK + b"x: " + b"y" * MAX_HEAD_BYTES + b"\r\n", b"z: " + b"y" * MAX_HEAD_BYTES],
        [b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"],
        [b"HTTP/1.1 99999 What\r\n\r\n"],
        [b"HTTP/1.1 600 What\r\ncontent-length: 2\r\n\r\nhi"],
    ],
)
def test_what_is_no_whole_http_answer_is_broken_never_a_hang(answer):
    with pytest.raises(BrokenReplyError):
        ask(answer)


def test_a_kept_connection_that_was_closed_is_replaced_once_and_unseen():
    whole = [OK + b"content-length: 2\r\n\r\nhi"]
    found, script = ask(whole, [Script.RESET], whole, times=2)
    assert ([body for _, _, body in found], script.num_connections) == ([b"hi", b"hi"], 2)
    with pytest.raises(BrokenReplyError):  # the fresh one too: no second try
        ask(whole, [Script.CLOSE], [Script.CLOSE], whole, times=2)


def test_a_server_that_may_have_worked_on_the_request_is_not_asked_again():
    whole = [OK + b"content-length: 2\r\n\r\nhi"]
    for death in ([0.4, Script.RESET], [b"HTTP/1.1 2", Script.RESET]):
        with pytest.raises(BrokenReplyError):
            ask(whole, death, whole, times=2)


def test_an_idle_connection_is_given_up_before_the_server_does():
    whole = [OK + b"content-length: 2\r\n\r\nhi"]

    async def run():
        script = Script(whole, whole)
        async with script.pool() as pool:
            await (await pool.ask(ASK)).read()
            now = asyncio.get_running_loop().time()
            pool.drop_idle(now + KEEPALIVE_S - 0.1)
            await asyncio.sleep(0.01)
            assert script.num_lost == 0
            pool.drop_idle(now + KEEPALIVE_S + 0.1)
            await asyncio.sleep(0.05)
            assert script.num_lost == 1
            assert await (await pool.ask(ASK)).read() == b"hi"
        assert script.num_connections == 2

    asyncio.run(run())


def test_closing_or_cancelling_an_unfinished_answer_cuts_the_connection_at_once():
    async def run():
        script = Script([OK + b"content-length: 9\r\n\r\nhi", 5.0], [5.0])
        async with script.pool() as pool:
            reply = await pool.ask(ASK)
            assert await reply.next() == b"hi"
            reply.close()
            waiting = asyncio.create_task(pool.ask(ASK))
            await asyncio.sleep(0.05)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert not pool._idle
            reply.fail(SilentServerError())
            with pytest.raises(SilentServerError):
                await reply.next()

    asyncio.run(run())


def test_an_early_answer_to_a_half_sent_body_costs_the_connection():
    async def run():
        async def refuse(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
            await asyncio.sleep(0.5)
            writer.close()

        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        pool = Pool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", 1.0)
        reply = await pool.ask(b"POST / HTTP/1.1\r\ncontent-length: 50000000\r\n\r\n" + b"x" * 50_000_000)
        assert (reply.status, await reply.read()) == (413, b"no")
        assert not pool._idle
        server.close()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_slow_reader_makes_the_server_wait():
    sent = 0

    async def run():
        async def pour(reader, writer):
            nonlocal sent
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK + b"content-length: 64000000\r\n\r\n")
            for _ in range(64):
                writer.write(b"x" * 1_000_000)
                await writer.drain()
                sent += 1_000_000
            writer.close()

        server = await asyncio.start_server(pour, "127.0.0.1", 0)
        pool = Pool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", 1.0)
        reply = await pool.ask(ASK)
        size = len(await reply.next())
        await asyncio.sleep(0.3)
        assert sent < 20_000_000  # what the sockets' buffers hold
        while piece := await reply.next():
            size += len(piece)
        assert size == 64_000_000
        server.close()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_no_connection_is_told_apart_from_a_broken_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # does not listen
        pool = Pool(f"http://127.0.0.1:{taken.getsockname()[1]}", 0.5)
        with pytest.raises(ConnectFailedError):
            asyncio.run(pool.ask(ASK))
