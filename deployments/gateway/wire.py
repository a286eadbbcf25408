"""HTTP/1.1 towards a model server: one connection, one answer at a time, parsed by httptools (llhttp).

    Connection.ask(bytes) -> Reply.start() -> status, headers
                             Reply.read() or Reply.next() until b""

Written out because the client library decides what a proxied request costs: aiohttp takes twice the CPU
of this, httpx ten times (docs/gateway.md has the figures). The parsing is llhttp's, strict: what it
refuses ends the answer as broken.

A connection serves again only after a complete answer that the server did not close, with the request
fully sent and no byte too many. Closing an unfinished Reply cuts the connection at once; vLLM takes
that for a client that went away and stops generating.

Ring: edge (network).  Units: bytes, seconds of the loop's clock.
"""

import asyncio
from collections import deque
from collections.abc import Callable

import httptools

MAX_HEAD_BYTES = 64 << 10
MAX_WHOLE_BYTES = 256 << 20
_HIGH_WATER_BYTES = 256 << 10  # past this the server has to wait for the client
_NO_STALE_AFTER_S = 0.25
_LAST_STATUS = 599
Headers = list[tuple[bytes, bytes]]


class BrokenReplyError(Exception):
    """The server broke off, or sent what is no HTTP/1.1."""


class StaleConnectionError(BrokenReplyError):
    """A kept connection was closed as the request was written: the server can't have worked on it."""


class SilentServerError(Exception):
    """The server took the request and then said nothing for too long."""


class Reply:
    """One answer. Whoever asked for it must read it to its end or close it."""

    __slots__ = ("_connection", "_error", "_pieces", "_size", "_waiter", "active_at", "complete", "headers", "status")

    def __init__(self, connection: "Connection", now: float) -> None:
        self.status = 0
        self.headers: Headers = []  # names in lower case
        self.complete = False
        self.active_at = now
        self._connection: Connection | None = connection
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def header(self, name: bytes) -> bytes:
        """Return the first value of a header, or nothing."""
        for known, value in self.headers:
            if known == name:
                return value
        return b""

    @property
    def is_waiting(self) -> bool:
        """Whether someone waits for the server, not the other way round."""
        return self._waiter is not None and not self._waiter.done()  # done: who waited was cancelled

    @property
    def has_more(self) -> bool:
        """Whether there is a piece to take at once."""
        return bool(self._pieces)

    @property
    def is_read(self) -> bool:
        """Whether the answer is whole and all of it was taken."""
        return self.complete and not self._pieces

    async def start(self) -> None:
        """Wait for status and headers. Raises BrokenReplyError, StaleConnectionError, SilentServerError."""
        while not self.status:
            if self._error is not None:
                raise self._error
            await self._wait()

    async def read(self) -> bytes:
        """Return the whole body. Raises BrokenReplyError or SilentServerError."""
        while not self.complete:
            if self._error is not None:
                raise self._error
            if self._size > MAX_WHOLE_BYTES:
                self.close()
                raise BrokenReplyError(f"the answer exceeds {MAX_WHOLE_BYTES} bytes")
            if self._connection is not None:
                self._connection.resume()
            await self._wait()
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    async def next(self) -> bytes:
        """Return what has come since, at least one byte; nothing at the end. Raises as `read`."""
        while not self._pieces:
            if self.complete:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait()
        pieces, self._size = self._pieces, 0
        piece = pieces.popleft() if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if self._connection is not None:
            self._connection.resume()
        return piece

    def close(self) -> None:
        """Let go; an unfinished answer costs the connection."""
        if self._connection is not None:
            self._connection.abort()
            self._connection = None

    def fail(self, error: Exception) -> None:
        """End the answer with an error and the connection with it."""
        if self._error is None and not self.complete:
            self._error = error
        self.close()
        self.wake()

    def wake(self) -> None:
        """Let the one who waits look again."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _wait(self) -> "asyncio.Future[None]":
        """Return what to await; no coroutine, which would be one more to go through."""
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        return waiter

    def add(self, piece: bytes) -> bool:
        """Take a piece of the body; say whether the connection is to pause reading. For Connection."""
        self._pieces.append(piece)
        self._size += len(piece)
        return self._size > _HIGH_WATER_BYTES

    def end(self) -> None:
        """Note the end. For Connection."""
        self.complete = True
        self._connection = None


class Connection(asyncio.Protocol):
    """One connection; `keep` is called with it when it can serve again."""

    def __init__(self, keep: Callable[["Connection"], None], loop: asyncio.AbstractEventLoop) -> None:
        self.idle_since = 0.0
        self.is_open = False
        self._keep = keep
        self._time = loop.time
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # set before anything else is called
        self._parser = httptools.HttpResponseParser(self)
        self._reply: Reply | None = None
        self._head_bytes = 0
        self._in_head = True
        self._has_length = False
        self._serves_again = False
        self._paused = False
        self._num_asked = 0
        self._heard = False

    def ask(self, data: bytes) -> Reply:
        """Send one request, head and body; never a HEAD, whose answer the parser could not end."""
        reply = self._reply = Reply(self, self._time())
        self._num_asked += 1
        self._head_bytes, self._in_head, self._heard, self._has_length = 0, True, False, False
        self._serves_again = False
        self._transport.write(data)
        return reply

    def abort(self) -> None:
        """Close at once, whatever is still to be sent."""
        self.is_open = False
        self._reply = None
        self._transport.abort()

    def resume(self) -> None:
        """Read on after the client caught up."""
        if self._paused:
            self._paused = False
            self._transport.resume_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = transport  # type: ignore[assignment]  # a stream's transport is a Transport
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        reply = self._reply
        if reply is None:  # nothing was asked: what it says is not for the next request
            self.abort()
            return
        self._heard = True
        reply.active_at = self._time()
        if self._in_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.abort()  # also when the answer was whole and something followed it
            reply.fail(BrokenReplyError(f"no HTTP/1.1 ({type(error).__name__})"))
            return
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            reply.fail(BrokenReplyError(f"the headers exceed {MAX_HEAD_BYTES} bytes"))
            return
        if reply.complete:
            self._finish()
        reply.wake()

    def eof_received(self) -> bool:
        """See asyncio.Protocol: a server that closes its side is done."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self.is_open = False
        reply, self._reply = self._reply, None
        if reply is None:
            return
        if exc is None and reply.status and not self._in_head and not self._has_length:
            reply.end()  # a body without a length ends with the connection
            reply.wake()
            return
        is_stale = self._num_asked > 1 and not self._heard and self._time() - reply.active_at < _NO_STALE_AFTER_S
        error = StaleConnectionError if is_stale else BrokenReplyError
        reply.fail(error("the server closed the connection"))

    # httptools calls these

    def on_message_begin(self) -> None:
        """Parser: an answer begins; a second one for the same request is one too many."""
        if self._reply is None or self._reply.complete:
            raise BrokenReplyError("more than one answer")
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """Parser: one header, or a trailer, which is dropped."""
        if self._in_head and self._reply is not None:
            name = name.lower()
            self._reply.headers.append((name, value))
            if name in (b"content-length", b"transfer-encoding"):
                self._has_length = True

    def on_headers_complete(self) -> None:
        """Parser: the head is whole. 1xx are only notices."""
        reply, status = self._reply, self._parser.get_status_code()
        assert reply is not None
        self._in_head = False
        if status == 101:
            raise BrokenReplyError("an upgrade that nobody asked for")
        if status > _LAST_STATUS:
            raise BrokenReplyError(f"there is no status {status}")  # nor can one be sent on
        if status < 200:
            reply.headers = []
            self._has_length = False
            return
        reply.status = status
        self._serves_again = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        """Parser: a piece of the body."""
        if self._reply is not None and self._reply.add(body) and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """Parser: the answer is whole."""
        if self._reply is not None and self._reply.status:
            self._reply.end()

    def _finish(self) -> None:
        self._reply = None
        self.resume()
        if self._serves_again and self.is_open and not self._transport.get_write_buffer_size():
            self.idle_since = self._time()
            self._keep(self)
        else:
            self.abort()
