"""The client's side of a connection: uvicorn's HTTP/1.1 on httptools, with limits that it lacks.

    uvicorn -> ClientConnection -> scope["extensions"]["tatara.line"] -> Exchange

Adds: a bound on the size of a request's head (431), a time limit for it (a connection that never says what
it wants is closed), errors in OpenAI's shape, word of a client that hangs up at once instead of by a task
per request that waits for it, and requests that offer another protocol beside HTTP/1.1 (`Upgrade: h2c`, which
Java's HttpClient sends) are served as if they did not, as RFC 9110, 7.8 asks. Trailers of a chunked body are
bounded as a head is, and dropped; answers to HTTP/1.0 are not chunked, which it does not know. Idle connections are
closed by the look that is taken at all of them once a second: a timer for each answer cost more than its parsing.

Ring: edge (network).  Units: bytes, seconds.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import httptools
from starlette.types import Message, Scope
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from deployments.gateway import replies
from deployments.gateway.wire import Headers

LINE = "tatara.line"


class _Transport:
    """A transport that can keep back one write, to send it with the next: one system call and packet, not two."""

    __slots__ = ("_held", "_transport", "_write", "holds_next", "is_closing")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._write = transport.write
        self.is_closing = transport.is_closing
        self._held = b""
        self.holds_next = False

    def write(self, data: bytes) -> None:
        """Write, or keep back."""
        if self.holds_next:
            self.holds_next, self._held = False, data
            return
        if self._held:
            data, self._held = self._held + data, b""
        self._write(data)

    def close(self) -> None:
        """Close when all is sent."""
        if self._held:
            self.write(b"")
        self._transport.close()

    def __getattr__(self, name: str) -> Any:  # Any: all else is the transport's own
        return getattr(self._transport, name)


class _Deaf:
    """A parser that takes nothing in: for what follows a message after which there is no next one."""

    def feed_data(self, data: bytes) -> None:
        """Drop it."""


class ClientConnection(HttpToolsProtocol):
    """One client's connection."""

    max_head_bytes = 64 << 10
    head_timeout_s = 30.0

    on_hang_up: Callable[[], None] | None = None
    _keep_promise: Callable[[], None] | None = None
    _head_bytes = 0
    _head_since: float | None = None
    _rest_since: float | None = None
    _idle_since: float | None = None
    _too_large = False
    _turn: RequestResponseCycle | None = None  # whose turn it is among pipelined requests

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        super().connection_made(_Transport(transport))  # type: ignore[arg-type]  # has all that uvicorn asks for
        self._head_since = self.loop.time()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._head_since is not None:
            self._head_bytes += len(data)
        if self._keep_promise is not None:
            self._keep_promise()
        self._idle_since = None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrades(memoryview(data)[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        if self._head_since is not None and self._head_bytes > self.max_head_bytes:
            self._refuse_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        super().connection_lost(exc)
        self._head_since = None
        if self._turn is not None:  # uvicorn tells the last one only
            self._turn.disconnected = True
            self._turn.message_event.set()
        tell, self.on_hang_up = self.on_hang_up, None
        if tell is not None:
            tell()

    def eof_received(self) -> None:
        """See asyncio.Protocol: the client says no more, which closes the connection; what is promised goes before."""
        if self._keep_promise is not None:
            self._keep_promise()

    def on_message_begin(self) -> None:
        """Parser: a request begins."""
        super().on_message_begin()
        self._idle_since = self._rest_since = None  # may have come in one packet with the end of an answered one
        self._head_since = self._head_since or self.loop.time()
        self.scope["extensions"] = {LINE: self}  # type: ignore[typeddict-item]  # an extension of ours

    def on_headers_complete(self) -> None:
        """Parser: the request's head is whole."""
        if self._head_bytes > self.max_head_bytes and _size_of(self.headers) > self.max_head_bytes:
            self._too_large = True
            raise ValueError("head too large")
        if not self.headers or self.headers[0][0] != b"host":  # nearly all clients send it first
            self._check_host()
        self._head_since, self._head_bytes = None, 0
        before = self.cycle
        super().on_headers_complete()
        if len(self.pipeline) == 1 and self.cycle is not before:  # else it offers an upgrade and is parsed again
            self._turn = before
        if self.scope["http_version"] == "1.0":
            self._end_by_closing()

    def on_chunk_header(self) -> None:
        """Parser: a chunk begins. The last one has no body but trailers, which count as a head and are dropped."""
        self._head_since, self._head_bytes = self.loop.time(), 0
        if self.headers:  # the first chunk: here, and not with each head, as few bodies are chunked
            _check_codings(self.headers)
        self.headers = []  # not those that the application has: RFC 9110, 6.5.1

    def on_chunk_complete(self) -> None:
        """Parser: a chunk ends, the last one with its trailers."""
        self._head_since = None

    def on_body(self, body: bytes) -> None:
        """Parser: a piece of the body. As uvicorn's, less what it asks about upgrades."""
        self._head_since = None
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        """Parser: a request is whole."""
        super().on_message_complete()
        if self.cycle is not None and self.cycle.response_complete:
            self._idle_since = self.loop.time()

    def on_response_complete(self) -> None:
        """An answer is sent. As uvicorn's, less its timer: see close_if_slow."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._turn, app = self.pipeline.pop()
            self._start_asgi_task(self._turn, app)
        elif self._head_since is None and (self.cycle is None or not self.cycle.more_body):
            self._idle_since = self.loop.time()  # else the rest of its body, or of the next head, is still to come

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in OpenAI's shape; the message is for the log."""
        self.logger.warning(msg)
        if self._too_large:
            self._refuse_head()
        else:
            self._refuse(400, "Bad Request", "this is no HTTP/1.1 request", "bad_request")

    def shutdown(self) -> None:
        """See uvicorn: the server stops."""
        if self._keep_promise is not None:
            self._keep_promise()
        super().shutdown()

    def abort(self) -> None:
        """Cut the connection at once, whatever is still to be sent."""
        self.transport.abort()

    def take_body(self, scope: Scope) -> bytes | None:
        """Return the body when all of it is here, as most are before their request is looked at; else None."""
        cycle = self.cycle
        if cycle is None or cycle.scope is not scope or cycle.more_body or cycle.disconnected:
            return None
        body, cycle.body = bytes(cycle.body), bytearray()
        self.flow.resume_reading()  # a hang-up is read, too
        return body

    def promise(
        self, scope: Scope, status: int, headers: Headers, body: bytes, keep: Callable[[], None]
    ) -> Callable[[], None] | None:
        """Return what sends a whole answer in one write: uvicorn looks at each header twice and is awaited twice.

        The answer counts as given from here on: who gets the promise has to keep it in this turn of the loop.
        None where uvicorn has more to do: another request's turn, a client that reads slowly or wants the connection
        closed.

        Args:
            scope: of the request.
            status: of the answer; one that has a body.
            headers: without `content-length` and `connection`.
            body: all of it.
            keep: has the promise kept at once, which what happens on the connection before that waits for.
        """
        cycle = self.cycle
        if cycle is None or cycle.scope is not scope or cycle.response_started or cycle.disconnected:
            return None
        if not cycle.keep_alive or self.flow.write_paused or self.transport.is_closing():
            return None
        lines = [b"%b: %b\r\n" % header for header in (*cycle.default_headers, *headers)]
        head = b"%bcontent-length: %d\r\n%b\r\n" % (STATUS_LINE[status], len(body), b"".join(lines))
        if head.count(b"\n") != len(lines) + 3:
            raise ValueError("a line end in a header of the answer")
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        self._keep_promise = keep
        return partial(self._send, cycle, head + body)

    def _send(self, cycle: RequestResponseCycle, data: bytes) -> None:
        self._keep_promise = None
        if not self.transport.is_closing():
            self.transport.write(data)
        cycle.message_event.set()
        self.on_response_complete()  # not the cycle's, which uvicorn takes from a request whose task has ended

    def hold_head(self) -> None:
        """Send the answer's head with the first piece of its body."""
        self.transport.holds_next = True  # type: ignore[attr-defined]  # see connection_made

    def close_if_slow(self, now: float) -> None:
        """Close a connection that is idle for too long, or on which a head or the rest of an answered body is slow."""
        cycle = self.cycle
        if self.pipeline or (cycle is not None and not (cycle.more_body or cycle.response_complete)):
            self._idle_since = self._rest_since = None  # it is our turn, and what follows may not even be read:
            self._head_since = now if self._head_since is not None else None  # its time counts from the answer on
            return
        if self._idle_since is not None and now - self._idle_since > self.timeout_keep_alive:
            self.transport.close()
        has_rest = cycle is not None and cycle.response_complete and self._idle_since is None
        has_rest = has_rest and not self.transport.is_closing()  # then it is the client's turn: it reads
        self._rest_since = (self._rest_since or now) if has_rest else None
        since = self._head_since or self._rest_since
        if since is not None and now - since > self.head_timeout_s:
            self.abort()

    def _end_by_closing(self) -> None:
        """Have an answer of unknown length to HTTP/1.0 end with the connection: RFC 9112, 6.1."""
        cycle = self.cycle
        if cycle is None or cycle.scope is not self.scope:
            return
        cycle.waiting_for_100_continue = False
        send_framed, has_length = cycle.send, False

        async def send(message: Message) -> None:
            nonlocal has_length
            if message["type"] == "http.response.start":
                has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
                cycle.chunked_encoding = None if has_length else False
            elif not has_length:
                cycle.expected_content_length = len(message.get("body", b""))
            await send_framed(message)  # type: ignore[arg-type]  # starlette's name for the same messages

        cycle.send = send  # type: ignore[method-assign]  # the cycle is uvicorn's to make

    def _should_upgrade(self) -> bool:
        """Have uvicorn start nothing for a request with an upgrade: see _ignore_upgrades, which parses it again."""
        return True

    def _ignore_upgrades(self, rest: memoryview) -> None:
        """Serve a request as if it offered no other protocol, and what follows it on the connection.

        The parser ends such a message after its head and leaves the body as bytes (uvicorn's issue 2722, httptools'
        124); it has no way back. So a fresh one reads the head again, without `Upgrade`: what frames the body is judged
        by the same rules as ever, and a request that follows can't be hidden in it.

        Args:
            rest: what was received after the head.
        """
        try:
            while True:
                if self.parser.get_method() == b"CONNECT":  # an upgrade, too, whatever its headers say
                    return self._refuse(400, "Bad Request", "CONNECT: this is no proxy", "bad_request")
                head = self._head_without_upgrade()
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn
                self.parser.feed_data(head)
                try:
                    return self.parser.feed_data(rest)
                except httptools.HttpParserUpgrade as upgrade:  # of the next request
                    rest = rest[upgrade.args[0] :]
        except httptools.HttpParserError:
            return self.send_400_response("Invalid HTTP request received.")

    def _head_without_upgrade(self) -> bytes:
        """Write the head again; the parser let no line end into any part of it."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        return b"%b\r\n" % b"".join(lines)

    def _check_host(self) -> None:
        """Raise ValueError for HTTP/1.1 without a host: RFC 9112, 3.2."""
        if self.parser.get_http_version() == "1.1" and not any(name == b"host" for name, _ in self.headers):
            raise ValueError("no host")

    def _refuse_head(self) -> None:
        self._head_since = None
        limit = f"the request's head exceeds {self.max_head_bytes} bytes"
        self._refuse(431, "Request Header Fields Too Large", limit, "headers_too_large")

    def _refuse(self, status: int, phrase: str, message: str, code: str) -> None:
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if not cycle.more_body:  # the fault is of what follows: a refusal now would be taken for its answer
                cycle.keep_alive = False
                self._head_since = None
                self.parser = cast(httptools.HttpRequestParser, _Deaf())  # all of one that is asked from here on
                return
            if cycle.response_started or self.pipeline:
                self.abort()  # in the middle of an answer, or before one that is due, there is no place for another
                return
        body = replies.encode(replies.error_body(status, message, code))
        head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()


def _size_of(headers: list[tuple[bytes, bytes]]) -> int:
    return sum(len(name) + len(value) + 4 for name, value in headers)


def _check_codings(headers: list[tuple[bytes, bytes]]) -> None:
    """Raise ValueError for a body that is more than chunked, as nobody here unpacks it: RFC 9112, 6.1."""
    codings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    if codings != [b"chunked"]:
        raise ValueError("a transfer coding beside chunked")
