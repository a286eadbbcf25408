"""One request from its plan to its trace: try the routes, forward the answer, let go of everything.

    RecordedStream(exchange) -> vLLM's bytes as they come -> client
                             -> one trace, before the last byte

The response object owns the upstream connection and closes it in its own `finally`: a client that
hangs up cancels this call, which closes the connection, which makes vLLM stop generating. (A
generator's `finally` would wait for garbage collection; background tasks are skipped on a hang-up.)

Ring: edge (network).
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.gateway import replies
from deployments.gateway.recorder import Recording
from deployments.gateway.routing import GENERATE, Ask, Choice, Json
from deployments.gateway.settings import Settings
from deployments.gateway.upstream import Upstream, UpstreamDownError, UpstreamTimeoutError
from tasks.traces.stream import StreamAssembler

_NOT_FORWARDED = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server", "x-request-id"}
    | {"proxy-authenticate", "proxy-authorization", "te", "trailer", "upgrade"}
)
_BROKEN = (aiohttp.ClientError, OSError, TimeoutError)
_JSON = [(b"content-type", b"application/json")]
_SSE = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """All that is needed to answer one request."""

    ask: Ask
    plan: Sequence[Choice]
    upstreams: Mapping[str, Upstream]
    headers: Mapping[str, Mapping[str, str]]  # per upstream: what goes along with the body
    settings: Settings
    recording: Recording


class RecordedStream(Response):
    """Answers by the first route that can, whole or as a stream, and leaves one trace."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._recording = exchange.recording
        self._reply: aiohttp.ClientResponse | None = None
        self._assembler: StreamAssembler | None = None
        self._hung_up = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the exchange; a hang-up cancels it."""
        task = asyncio.current_task()
        watcher = asyncio.ensure_future(self._watch(receive, task))
        try:
            await self._answer(send)
        except asyncio.CancelledError:
            self._finish_partial("the client hung up" if self._hung_up else "the gateway was stopped")
            if not self._hung_up or task is None or task.uncancel() > 0:
                raise
        except BaseException as error:
            self._recording.finish("error", 500, error=type(error).__name__)
            raise
        finally:
            watcher.cancel()
            if self._reply is not None:
                self._reply.close()

    async def _watch(self, receive: Receive, task: "asyncio.Task[Any] | None") -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if task is not None and not self._recording.finished:
            self._hung_up = True
            task.cancel()

    def _finish_partial(self, why: str) -> None:
        """Record a request that was cut off: 499 is what nginx calls a client that went away."""
        answer, stats = self._assembled() if self._assembler else (None, None)
        self._recording.finish("cancelled", 499, answer, error=why, stream=stats)

    def _assembled(self) -> tuple[Json | None, Json]:
        assert self._assembler is not None
        self._assembler.finish()
        return self._assembler.answer(), self._assembler.stats()

    async def _answer(self, send: Send) -> None:
        for choice in self._exchange.plan:
            self._recording.choice = choice
            if choice.route == "maintenance":
                return await self._send_maintenance(send)
            upstream = self._exchange.upstreams.get(choice.route)
            if upstream is None or upstream.is_down:
                continue
            try:
                self._reply = await self._open(upstream)
            except UpstreamDownError:
                continue
            except UpstreamTimeoutError:
                waited_s = self._exchange.settings.read_timeout_s
                return await self._send_error(send, 504, f"{choice.route} said nothing for {waited_s:g} s", "timeout")
            if "text/event-stream" in self._reply.content_type:
                return await self._forward_stream(send, self._reply)
            return await self._forward_whole(send, self._reply)
        return await self._send_error(send, 503, "the model server is down: try again in a moment", "upstream_down")

    async def _open(self, upstream: Upstream) -> aiohttp.ClientResponse:
        exchange, body = self._exchange, self._exchange.ask.raw
        headers = {**exchange.headers[upstream.name], "X-Request-Id": self._recording.trace_id}
        if upstream.name == "lite":
            name = exchange.settings.lite_model_name or await upstream.pick_model(headers)
            body = replies.encode(exchange.ask.body | {"model": name}) if name else body
        return await upstream.open(exchange.ask.path, body, headers)

    async def _forward_whole(self, send: Send, reply: aiohttp.ClientResponse) -> None:
        try:
            data = await reply.read()
        except _BROKEN as error:
            broken = f"the model server broke off its answer ({type(error).__name__})"
            await self._send_error(send, 502, broken, "upstream_broke_off")
            return
        self._recording.note_first()
        body = _object(data)
        if body is not None and reply.status == 200 and self._exchange.ask.endpoint == GENERATE:
            body = replies.with_output(body)
            data = replies.encode(body)
        if reply.status < 400:
            self._recording.finish("ok", reply.status, body)
        else:
            self._recording.finish("upstream_error", reply.status, body, error=_error_of(body, reply.status))
        await self._send(send, reply.status, _forwarded(reply), data)

    async def _forward_stream(self, send: Send, reply: aiohttp.ClientResponse) -> None:
        assembler = self._assembler = StreamAssembler()
        await send({"type": "http.response.start", "status": reply.status, "headers": self._ours(_forwarded(reply))})
        tail, broken = b"", ""
        try:
            async for piece in reply.content.iter_any():
                self._recording.note_first()
                assembler.feed(piece)
                tail = (tail + piece)[-2:]
                if assembler.done:
                    self._finish_stream(reply.status, "")
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except _BROKEN as error:
            broken = f"the model server broke off its answer ({type(error).__name__})"
        self._finish_stream(reply.status, broken)
        if broken and tail == b"\n\n":  # between two events: say it in the stream
            event = replies.encode_event(replies.error_body(502, broken, "upstream_broke_off"))
            await send({"type": "http.response.body", "body": event, "more_body": True})
        elif broken:
            return  # inside an event: uvicorn cuts the connection, which no client takes for the end
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _finish_stream(self, status: int, broken: str) -> None:
        if self._recording.finished or self._assembler is None:
            return
        answer, stats = self._assembled()
        error = broken or self._assembler.error
        self._recording.finish("upstream_error" if error else "ok", status, answer, error=error or None, stream=stats)

    async def _send_maintenance(self, send: Send) -> None:
        ask, settings, recording = self._exchange.ask, self._exchange.settings, self._recording
        said = (ask, settings.maintenance_message, recording.trace_id, recording.started_us // 1_000_000)
        body = replies.maintenance_body(*said)
        recording.note_first()
        if ask.streams:
            recording.finish("ok", 200, body, stream={"chunks": 2, "malformed": 0, "done": True, "truncated": False})
            return await self._send(send, 200, _SSE, b"".join(replies.maintenance_events(*said)))
        recording.finish("ok", 200, body)
        return await self._send(send, 200, _JSON, replies.encode(body))

    async def _send_error(self, send: Send, status: int, message: str, code: str) -> None:
        body = replies.error_body(status, message, code)
        self._recording.finish("upstream_error" if status == 502 else "error", status, body, error=message)
        retry = [(b"retry-after", b"1")] if status == 503 else []
        await self._send(send, status, _JSON + retry, replies.encode(body))

    async def _send(self, send: Send, status: int, headers: Headers, data: bytes) -> None:
        length = (b"content-length", str(len(data)).encode())
        await send({"type": "http.response.start", "status": status, "headers": self._ours([*headers, length])})
        await send({"type": "http.response.body", "body": data})

    def _ours(self, headers: Headers) -> Headers:
        choice = self._recording.choice
        return [
            *headers,
            (b"x-request-id", self._recording.trace_id.encode()),
            (b"x-tatara-route", choice.route.encode()),
            (b"x-tatara-reason", choice.reason.encode()),
        ]


def _forwarded(reply: aiohttp.ClientResponse) -> Headers:
    return [(name, value) for name, value in reply.raw_headers if name.lower().decode("latin-1") not in _NOT_FORWARDED]


def _object(data: bytes) -> Json | None:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def _error_of(body: Json | None, status: int) -> str:
    """Find the message in an error body: OpenAI's shape, vLLM's older one, or none."""
    error = body.get("error", body) if body else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message) if message else f"status {status}"
