"""One request from its first byte to its trace: who asks, may they, who answers, and letting go of it all.

    Exchange.run() -> body -> key, budget, place -> routes in turn -> forward.py -> one trace

The exchange owns the model server's answer and closes it in its own `finally`: a client that hangs up
cancels this task, which cuts the connection, which makes vLLM stop generating. (A generator's `finally`
would wait for garbage collection; background tasks are skipped on a hang-up.)

A request is tried elsewhere only when the server can't have worked on it: no connection, or a kept one that
was already closed. After the first byte nothing is tried again.

Ring: edge (network).  Units: seconds of the loop's clock.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.types import Receive, Scope, Send

from deployments.gateway import replies
from deployments.gateway.admission import BusyError
from deployments.gateway.asking import ask_for_lite, body_for, lines_for
from deployments.gateway.forward import assembled, forward
from deployments.gateway.intake import (
    HungUpError,
    authenticate,
    check_budget,
    check_size,
    read_body,
    read_head,
    refuse_body,
)
from deployments.gateway.keys import Key
from deployments.gateway.line import LINE
from deployments.gateway.pool import ConnectFailedError
from deployments.gateway.replies import RETRY_SOON, RefusedError
from deployments.gateway.routing import CHAT, COMPLETIONS, Ask, BadRequestError, Choice, read_ask, why_not_short
from deployments.gateway.upstream import NO_IDS, Upstream
from deployments.gateway.wire import BrokenReplyError, Headers, Reply, SilentServerError
from tasks.traces.responses_stream import ResponsesAssembler
from tasks.traces.stream import StreamAssembler

if TYPE_CHECKING:
    from deployments.gateway.gateway import Gateway
    from tasks.traces.record import Status
_STOPPED = "the gateway was stopped"


class Exchange:
    """One request to a hot route."""

    __slots__ = (
        "_deadline", "_expired", "_has_place", "_head", "_hung_up", "_line", "_phase", "_scope", "_seen", "_task",
        "_upstream", "ask", "assembler", "began", "endpoint", "failed", "gateway", "key",
        "recording", "reply", "started", "status", "withholds_usage",
    )  # fmt: skip

    def __init__(self, gateway: "Gateway", endpoint: str, scope: Scope) -> None:
        self.gateway = gateway
        self.endpoint = endpoint
        self.recording = gateway.recorder.begin(endpoint)
        settings = gateway.settings
        self._task = asyncio.current_task()
        self.began = asyncio.get_running_loop().time()
        self._deadline = self.began + settings.body_timeout_s
        self._scope = scope
        self._head = read_head(scope["headers"])
        self._line = scope.get("extensions", {}).get(LINE)
        self.ask: Ask = None  # type: ignore[assignment]  # set before anything of it is read
        self.key: Key | None = None
        self.reply: Reply | None = None
        self.assembler: StreamAssembler | ResponsesAssembler | None = None
        self.started = False  # the answer's head was sent
        self.status = 0
        self.failed = False  # the model server's fault
        self.withholds_usage = False
        self._upstream: Upstream | None = None
        self._has_place = self._seen = self._hung_up = self._expired = False
        self._phase = "body"

    async def run(self, receive: Receive, send: Send) -> None:
        """Answer the request, whatever happens, and leave one trace."""
        self.gateway.running.add(self)
        if self._line is not None:
            self._line.on_hang_up = self._hang_up
        try:
            await self._answer(receive, send)
        except RefusedError as refused:
            await self._refuse(send, refused)
        except HungUpError:
            self._hung_up = True
            await self._end_early(send)
        except asyncio.CancelledError:
            await self._end_early(send)
        except BaseException as error:
            self.finish("error", 500, error=type(error).__name__)
            raise
        finally:
            self._let_go()

    def check_time(self, now: float) -> None:
        """End what takes too long. Called a few times a second by the gateway's clock."""
        reply = self.reply
        if now > self._deadline:
            if self._task is not None and not self._expired and not self._hung_up:
                self._expired = True
                self._task.cancel()
        elif reply is not None and reply.is_waiting and now - reply.active_at > self.gateway.settings.read_timeout_s:
            reply.fail(SilentServerError())

    def finish(
        self,
        status: "Status",
        http_status: int,
        response: Any = None,  # Any: JSON objects
        *,
        error: str | None = None,
        stream: Any = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Write the trace and count; the first outcome is the one that counts. `then`: see Recording.finish."""
        if self.recording.finished:
            return
        self.status = http_status
        self.failed = status == "upstream_error" and not 400 <= http_status < 500  # a stream's break has 200
        later = then if len(self.gateway.running) > 1 else None  # alone there is nobody to wait for
        self.recording.finish(status, http_status, response, error=error, stream=stream, then=later)
        if isinstance(response, dict):
            self.gateway.charge(self.key, response.get("usage"))
        if then is not None and later is None:
            then()

    def headers(self) -> Headers:
        """Return the headers that lead back: ids and the decision."""
        return [
            (b"x-request-id", self.recording.trace_id.encode()),
            *self.recording.choice.headers,
            *(self._upstream.id_headers if self._upstream is not None else ()),
        ]

    def hold_head(self) -> None:
        """Send the head with what follows at once."""
        if self._line is not None:
            self._line.hold_head()

    async def cut(self) -> None:
        """Cut the client's connection in the middle of an answer, which no client takes for the end."""
        if self._line is not None:
            self._line.on_hang_up = None
            self._line.abort()
            await asyncio.sleep(0.001)  # uvicorn then knows it and does not log a fault of ours

    async def _answer(self, receive: Receive, send: Send) -> None:
        head, gateway = self._head, self.gateway
        if gateway.keys is not None:
            self.key = authenticate(gateway.keys, head.authorization)
            self.recording.key_name = self.key.name if self.key else None
        raw = self._line.take_body(self._scope) if self._line is not None else None
        if raw is None:
            raw = await read_body(receive, head.declared_bytes, gateway.settings.max_body_bytes)
        else:
            check_size(len(raw), gateway.settings.max_body_bytes)
        try:
            ask = self.ask = read_ask(self.endpoint, raw)
        except BadRequestError as error:
            raise refuse_body(str(error), self._scope["headers"]) from None
        self.recording.request = ask.body
        if self.key is not None:
            check_budget(self.key, gateway.budgets, ask.body.get("model"))
        if not gateway.gate.try_enter():
            await self._wait_for_place()
        self._has_place = True
        self._phase = "answer"
        self._deadline = self.began + gateway.settings.total_timeout_s
        watcher = None if self._line is not None else asyncio.create_task(self._watch(receive))
        try:
            await self._try_routes(send)
        finally:
            if watcher is not None:
                watcher.cancel()

    async def _wait_for_place(self) -> None:
        client = self._scope.get("client")
        try:
            await self.gateway.gate.wait(self.key.name if self.key else str(client[0]) if client else "")
        except BusyError as error:
            self.recording.choice = Choice(route="none", reason="overloaded")
            raise RefusedError(503, f"the gateway is busy: {error}", "overloaded", RETRY_SOON) from None

    async def _try_routes(self, send: Send) -> None:
        ask, settings = self.ask, self.gateway.settings
        for choice in self.gateway.plan(ask.path, why_not_short(ask, settings.lite_max_chars)):
            if choice.reason == "lite-down":
                choice = Choice(route=choice.route, reason=self.gateway.fleet.why_not_lite())
            self.recording.choice = choice
            if choice.route == "maintenance":
                await self._send_maintenance(send)
                return
            reply = None if self._seen else await self._open(choice)
            if reply is not None:
                await forward(self, reply, send)
                return
        if self._seen:
            raise RefusedError(502, "the model server broke off before it answered", "upstream_broke_off")
        raise RefusedError(503, "the model server is down: try again in a moment", "upstream_down", RETRY_SOON)

    async def _open(self, choice: Choice) -> Reply | None:
        """Ask the servers of a route until one answers; None when none can."""
        for upstream in self.gateway.fleet.order(choice.route):
            self._go_to(upstream)
            try:
                settings = self.gateway.settings
                ask = await ask_for_lite(upstream, self.ask, settings) if upstream.is_lite else self.ask
                body, self.withholds_usage = body_for(ask, settings)
                lines = lines_for(
                    upstream, self._head, self.recording.trace_id, with_keys=self.gateway.keys is not None
                )
                return await upstream.ask(upstream.post(self.ask.path, lines, body), self._note)
            except ConnectFailedError:
                upstream.counts.failed += 1
                continue
            except BrokenReplyError:  # it may have worked on it: nobody else is asked the same
                self._seen = True
                return None
            except SilentServerError:
                silent_s = self.gateway.settings.read_timeout_s
                raise RefusedError(504, f"{choice.route} said nothing for {silent_s:g} s", "timeout") from None
        return None

    def _note(self, reply: Reply) -> None:
        self.reply = reply

    async def _send_maintenance(self, send: Send) -> None:
        if self._seen and self._upstream is not None:
            self._upstream.counts.failed += 1
        self._go_to(None)
        ask, recording = self.ask, self.recording
        created_s = recording.started_us // 1_000_000
        said = (ask, self.gateway.settings.maintenance_message, recording.trace_id, created_s)
        body = replies.maintenance_body(*said)
        recording.note_first()
        streams = ask.path in (CHAT, COMPLETIONS) and ask.streams
        stats = {"chunks": 2, "malformed": 0, "done": True, "truncated": False} if streams else None
        self.finish("ok", 200, body, stream=stats)
        head = replies.SSE if streams else replies.JSON
        data = b"".join(replies.maintenance_events(*said)) if streams else replies.encode(body)
        await self.send_whole(send, 200, head, data)

    async def _refuse(self, send: Send, refused: RefusedError) -> None:
        body = replies.error_body(refused.status, str(refused), refused.code)
        self.gateway.metrics.note_rejected(refused.code)
        self.finish("upstream_error" if refused.status == 502 else "error", refused.status, body, error=str(refused))
        await self.send_whole(send, refused.status, [*replies.JSON, *refused.headers], replies.encode(body))

    def promise(self, status: int, headers: Headers, data: bytes) -> Callable[[], None] | None:
        """Return what sends a whole answer at once; None where that can't be, and `send_whole` has to."""
        if self._line is None:
            return None
        then = self.gateway.recorder.flush
        send = self._line.promise(self._scope, status, [*headers, *self.headers()], data, then)
        self.started = send is not None
        return send

    async def send_whole(self, send: Send, status: int, headers: Headers, data: bytes | None) -> None:
        """Send an answer of known length; None is one that may have no body, as 204."""
        self.started = True
        length = [] if data is None else [(b"content-length", b"%d" % len(data))]
        head = [*headers, *length, *self.headers()]
        self.hold_head()
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": data or b""})

    async def _watch(self, receive: Receive) -> None:
        """Wait for the hang-up, under a server that does not tell it (see line.py)."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._hang_up()

    def _hang_up(self) -> None:
        if self._task is not None and not self.recording.finished and not self._expired:
            self._hung_up = True
            self._task.cancel()

    async def _end_early(self, send: Send) -> None:
        """End a request that was cancelled: by the client, by its time limit, or by the server's shutdown."""
        if self._task is not None:
            self._task.uncancel()
        answer, stats = assembled(self.assembler) if self.assembler else (None, None)
        if self._expired or not self._hung_up:
            refused = self._say_expired() if self._expired else RefusedError(503, _STOPPED, "stopping", RETRY_SOON)
            status = "error" if self._expired else "cancelled"
            http_status = 499 if self.started and not self._expired else refused.status
            self.finish(status, http_status, answer, error=str(refused), stream=stats)
            if not self.started:
                return await self._refuse(send, refused)
            return await self.cut()
        where = " while it sent the body" if self._phase == "body" else ""
        return self.finish("cancelled", 499, answer, error=f"the client hung up{where}", stream=stats)

    def _say_expired(self) -> RefusedError:
        settings = self.gateway.settings
        if self._phase == "body":
            close = [(b"connection", b"close")]
            return RefusedError(408, f"the body took longer than {settings.body_timeout_s:g} s", "body_too_slow", close)
        return RefusedError(504, f"the request took longer than {settings.total_timeout_s:g} s", "timeout")

    def _go_to(self, upstream: Upstream | None) -> None:
        """Leave the server that was asked, for the next one or for none: its ids go into headers and trace."""
        if self._upstream is not None:
            self._upstream.num_running -= 1
        self._upstream = upstream
        if upstream is not None:
            upstream.num_running += 1
        self.recording.note_upstream(upstream.name if upstream else None, upstream.ids if upstream else NO_IDS)

    def _let_go(self) -> None:
        if self._line is not None:
            self._line.on_hang_up = None
        if self.reply is not None:
            self.reply.close()
        seconds = asyncio.get_running_loop().time() - self.began
        if self._upstream is not None:
            self._upstream.num_running -= 1
            if self.recording.finished and not self._hung_up:  # what the client broke off is no sign of the server
                self._upstream.counts.note(self.status, seconds, failed=self.failed)
        gateway = self.gateway
        if self._has_place:
            gateway.gate.leave()
        gateway.running.discard(self)
        recording = self.recording
        first_s = (recording.first_us - recording.started_us) / 1e6 if recording.first_us else None
        gateway.metrics.note_end(self.endpoint, recording.choice.route, self.status, seconds, first_s)
