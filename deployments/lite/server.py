"""The lite model over HTTP, for the gateway alone: chat completions, completions, models, health.

    Lite (ASGI) -> one thread generates -> whole answer or SSE, token by token

One answer at a time; `room` more may wait, beyond them 503. A client that hangs up ends its generation at
the next token, also while it waits.

Ring: edge (network, threads).
"""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import orjson
from starlette.types import Receive, Scope, Send

from deployments.lite import answers
from deployments.lite.answers import Head
from deployments.lite.asked import CHAT, COMPLETIONS, AskError, Json, Wish, read_wish

logger = logging.getLogger(__name__)


class Speaks(Protocol):
    """What the server asks of a model (model.LiteModel)."""

    def prompt_ids(self, wish: Wish) -> list[int]:
        """Return the prompt's tokens."""
        ...

    def say(self, ids: list[int], wish: Wish, show: Any, is_wanted: Any) -> tuple[str, int]:  # Any: callables
        """Generate."""
        ...


class Lite:
    """The application."""

    def __init__(self, model: Speaks, name: str, room: int) -> None:
        self._model = model
        self._name = name
        self._room = room
        self._num_here = 0
        self._one = ThreadPoolExecutor(1, "generate")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        path, method = scope["path"], scope["method"]
        if method == "GET" and path == "/health":
            await _send(send, 200, {"status": "ok"})
        elif method == "GET" and path == "/v1/models":
            model = {"id": self._name, "object": "model", "created": 0, "owned_by": "tatara"}
            await _send(send, 200, {"object": "list", "data": [model]})
        elif method == "POST" and path in (CHAT, COMPLETIONS):
            await self._take(scope, receive, send)
        else:
            await _refuse(send, 404, f"{method} {path}: the lite model has no such route", "route_error")

    async def _take(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        if body is None:
            return
        if self._num_here > self._room:
            await _refuse(send, 503, f"{self._num_here} requests are here already", "overloaded")
            return
        self._num_here += 1
        try:
            await self._answer(scope, body, receive, send)
        except AskError as error:
            await _refuse(send, 400, str(error), "invalid_body")
        finally:
            self._num_here -= 1

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        try:
            wish = read_wish(scope["path"], orjson.loads(body))
        except orjson.JSONDecodeError as error:
            raise AskError(f"the body is not JSON: {error}") from None
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(self._one, self._model.prompt_ids, wish)
        asked_as = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1") or f"{time.time_ns():x}"
        head = Head(path=scope["path"], answer_id=f"chatcmpl-{asked_as}", created_s=int(time.time()), model=self._name)
        pieces: asyncio.Queue[tuple[str, str] | None] = asyncio.Queue()
        gone = asyncio.Event()
        watcher = asyncio.create_task(_watch(receive, gone))

        def show(part: str, text: str) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, (part, text))

        def work() -> tuple[str, int]:
            try:
                return self._model.say(ids, wish, show, lambda: not gone.is_set()) if not gone.is_set() else ("", 0)
            finally:
                loop.call_soon_threadsafe(pieces.put_nowait, None)

        said = loop.run_in_executor(self._one, work)
        try:
            await (_stream if wish.streams else _whole)(head, wish, len(ids), pieces, said, send)
        finally:
            gone.set()
            watcher.cancel()


Pieces = asyncio.Queue[tuple[str, str] | None]


async def _whole(
    head: Head, wish: Wish, num_prompt: int, pieces: Pieces, said: asyncio.Future[tuple[str, int]], send: Send
) -> None:
    texts = {"content": "", "reasoning": ""}
    while (piece := await pieces.get()) is not None:
        texts[piece[0]] += piece[1]
    finish, num_said = await said
    await _send(send, 200, head.whole(texts, finish, answers.usage_of(num_prompt, num_said)))


async def _stream(
    head: Head, wish: Wish, num_prompt: int, pieces: Pieces, said: asyncio.Future[tuple[str, int]], send: Send
) -> None:
    """Send pieces as they come; a generation that fails breaks the stream off, which no client takes for its end."""
    kind = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": kind})
    await send({"type": "http.response.body", "body": head.first(), "more_body": True})
    while (piece := await pieces.get()) is not None:
        await send({"type": "http.response.body", "body": head.piece(*piece), "more_body": True})
    finish, num_said = await said
    usage = answers.usage_of(num_prompt, num_said) if wish.with_usage else None
    await send({"type": "http.response.body", "body": head.last(finish, usage), "more_body": False})


async def _watch(receive: Receive, gone: asyncio.Event) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()


async def _read(receive: Receive) -> bytes | None:
    """Return the body, or None from a client that went away. The gateway has bounded its size."""
    pieces: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(pieces)


async def _refuse(send: Send, status: int, message: str, code: str) -> None:
    kind = "service_unavailable_error" if status == 503 else "invalid_request_error"
    await _send(send, status, answers.error_body(message, kind, code))


async def _send(send: Send, status: int, body: Json) -> None:
    data = orjson.dumps(body)
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
    if status == 503:
        head.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": data})
