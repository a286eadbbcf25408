"""Hand a model server's answer to the client: whole, or as a stream, piece by piece as it comes.

    forward(exchange, reply, send) -> the client has it, the trace is written before its last byte

Ring: edge (network).
"""

from types import CoroutineType
from typing import TYPE_CHECKING, Any

from starlette.types import Send

from deployments.gateway import replies
from deployments.gateway.fast_json import loads
from deployments.gateway.replies import RefusedError
from deployments.gateway.routing import GENERATE, RESPONSES, Json
from deployments.gateway.usage_filter import UsageFilter
from deployments.gateway.wire import BrokenReplyError, Headers, Reply, SilentServerError
from tasks.traces.responses_stream import ResponsesAssembler
from tasks.traces.stream import StreamAssembler

if TYPE_CHECKING:
    from deployments.gateway.exchange import Exchange

_NOT_FORWARDED = frozenset(
    {b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"date", b"server", b"x-request-id"}
    | {b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te", b"trailer", b"upgrade"}
)


def forward(exchange: "Exchange", reply: Reply, send: Send) -> "CoroutineType[Any, Any, None]":
    """Send the answer on. Raises RefusedError while nothing of it was sent."""
    is_stream = b"text/event-stream" in reply.header(b"content-type")
    return _forward_stream(exchange, reply, send) if is_stream else _forward_whole(exchange, reply, send)


async def _forward_whole(exchange: "Exchange", reply: Reply, send: Send) -> None:
    try:
        data = await reply.read()
    except BrokenReplyError as error:
        raise RefusedError(502, f"the model server broke off its answer: {error}", "upstream_broke_off") from None
    except SilentServerError:
        raise RefusedError(504, "the model server stopped in the middle of its answer", "timeout") from None
    exchange.recording.note_first()
    body, status = _object(data), reply.status
    if body is not None and status == 200 and exchange.endpoint == GENERATE:
        body = replies.with_output(body)
        data = replies.encode(body)
    headers, has_body = forwarded(reply.headers), status not in (204, 304)
    promise = exchange.promise(status, headers, data) if has_body else None
    if status < 400:
        exchange.finish("ok", status, body, then=promise)
    else:
        exchange.finish("upstream_error", status, body, error=_error_of(body, status), then=promise)
    if promise is None:
        await exchange.send_whole(send, status, headers, data if has_body else None)


async def _forward_stream(exchange: "Exchange", reply: Reply, send: Send) -> None:
    assembler = ResponsesAssembler() if exchange.endpoint == RESPONSES else StreamAssembler()
    exchange.assembler = assembler
    hold = UsageFilter() if exchange.withholds_usage else None
    exchange.started = True
    head = [*forwarded(reply.headers), *exchange.headers()]
    if reply.has_more:
        exchange.hold_head()
    await send({"type": "http.response.start", "status": reply.status, "headers": head})
    piece, tail, broken, is_done = b"", b"", "", False
    try:
        while piece := await reply.next():
            exchange.recording.note_first()
            assembler.feed(piece)
            if assembler.done and not is_done:
                is_done = True
                _finish_stream(exchange, assembler, reply.status, "")
            if hold is not None:
                piece = hold.feed(piece)
            if reply.is_read:  # the end goes with the last piece
                break
            if piece:
                tail = (tail + piece)[-4:]
                await send({"type": "http.response.body", "body": piece, "more_body": True})
    except BrokenReplyError as error:
        broken = f"the model server broke off its answer: {error}"
    except SilentServerError:
        broken = "the model server broke off its answer: it said nothing for too long"
    _finish_stream(exchange, assembler, reply.status, broken)
    rest = b"" if broken else piece
    await _end_stream(exchange, send, rest + (hold.flush() if hold else b""), tail, broken)


async def _end_stream(exchange: "Exchange", send: Send, held: bytes, tail: bytes, broken: str) -> None:
    if not broken:
        await send({"type": "http.response.body", "body": held, "more_body": False})
    elif not held and (not tail or tail.endswith((b"\n\n", b"\r\n\r\n"))):  # between two events: say it in the stream
        event = replies.encode_event(replies.error_body(502, broken, "upstream_broke_off"))
        await send({"type": "http.response.body", "body": event, "more_body": False})
    else:  # inside an event
        await send({"type": "http.response.body", "body": held, "more_body": True})
        await exchange.cut()


def _finish_stream(
    exchange: "Exchange", assembler: StreamAssembler | ResponsesAssembler, status: int, broken: str
) -> None:
    if exchange.recording.finished:
        return
    answer, stats = assembled(assembler)
    error = broken or assembler.error
    exchange.finish("upstream_error" if error else "ok", status, answer, error=error or None, stream=stats)


def assembled(assembler: StreamAssembler | ResponsesAssembler) -> tuple[Json | None, Json]:
    """Return the answer as far as it came, and what was counted."""
    assembler.finish()
    return assembler.answer(), assembler.stats()


def forwarded(headers: Headers) -> Headers:
    """Drop what belongs to the connection, and what only the gateway may say."""
    return [
        (name, value) for name, value in headers if name not in _NOT_FORWARDED and not name.startswith(b"x-tatara-")
    ]


def _object(data: bytes) -> Json | None:
    try:
        body = loads(data)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def _error_of(body: Json | None, status: int) -> str:
    """Find the message in an error body: OpenAI's shape, vLLM's older one, or none."""
    error = body.get("error", body) if body else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message) if message else f"status {status}"
