"""The gateway's routes, thin: read the body, plan, hand over to RecordedStream.

Ring: edge.
"""

import asyncio
from typing import Any

import aiohttp
from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from deployments.gateway import replies
from deployments.gateway.exchange import Exchange, RecordedStream
from deployments.gateway.recorder import Recorder, Recording
from deployments.gateway.routing import CHAT, COMPLETIONS, GENERATE, BadRequestError, plan_routes, read_ask
from deployments.gateway.settings import Settings
from deployments.gateway.upstream import Upstream, UpstreamDownError, UpstreamTimeoutError

_PASSED_ON = ("authorization", "traceparent", "tracestate", "accept-language")
router = APIRouter()


class _TooLargeError(Exception):
    """The body exceeds GATEWAY_MAX_BODY_BYTES."""


@router.post(CHAT, response_model=None)
async def chat(request: Request) -> Response:
    """OpenAI's chat completions, whole or streamed."""
    return await _answer(request, CHAT)


@router.post(COMPLETIONS, response_model=None)
async def completions(request: Request) -> Response:
    """OpenAI's text completions, whole or streamed."""
    return await _answer(request, COMPLETIONS)


@router.post(GENERATE, response_model=None)
async def generate(request: Request) -> Response:
    """One text in (`input` or `prompt`), one text out (`output`, beside OpenAI's fields)."""
    return await _answer(request, GENERATE)


@router.get("/v1/models", response_model=None)
async def models(request: Request) -> Response:
    """The models that vLLM serves; the lite server's while vLLM is down."""
    for upstream in request.app.state.upstreams.values():
        if upstream.is_down:
            continue
        try:
            reply = await upstream.open("/v1/models", None, _headers_for(request, upstream.name), method="GET")
            async with reply:
                return Response(await reply.read(), reply.status, media_type=reply.content_type)
        except (UpstreamDownError, UpstreamTimeoutError, aiohttp.ClientError, OSError):
            continue
    return error_response(503, "no model server answers: try again in a moment", "upstream_down")


@router.get("/health", response_model=None)
async def health(request: Request) -> dict[str, Any]:  # Any: flags and counts
    """200 as long as the gateway lives; says whether vLLM does, and what became of the traces."""
    upstreams: dict[str, Upstream] = request.app.state.upstreams
    alive = await asyncio.gather(*(upstream.is_healthy() for upstream in upstreams.values()))
    recorder: Recorder = request.app.state.recorder
    return {"gateway": "ok", **dict(zip(upstreams, alive, strict=True)), "traces": recorder.counts()}


@router.get("/ready", response_model=None)
async def ready(request: Request) -> Response:
    """200 when a model can answer, else 503."""
    alive = [name for name, upstream in request.app.state.upstreams.items() if await upstream.is_healthy()]
    if alive:
        return Response(replies.encode({"ready": True, "models": alive}), media_type="application/json")
    return error_response(503, "no model server answers", "not_ready")


def error_response(status: int, message: str, code: str) -> Response:
    """Return an error in OpenAI's shape."""
    headers = {"retry-after": "1"} if status == 503 else None
    body = replies.encode(replies.error_body(status, message, code))
    return Response(body, status, headers, media_type="application/json")


async def _answer(request: Request, endpoint: str) -> Response:
    settings: Settings = request.app.state.settings
    recording = request.app.state.recorder.begin(endpoint)
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            raw = await _read_body(request, settings.max_body_bytes)
        ask = read_ask(endpoint, raw)
    except BadRequestError as error:
        return _refuse(recording, 400, str(error), "invalid_body")
    except _TooLargeError:
        message = f"the body exceeds {settings.max_body_bytes} bytes: shorten it, or raise GATEWAY_MAX_BODY_BYTES"
        return _refuse(recording, 413, message, "body_too_large")
    except TimeoutError:
        return _refuse(recording, 408, f"the body took longer than {settings.body_timeout_s:g} s", "body_too_slow")
    except ClientDisconnect:
        recording.finish("cancelled", 499, error="the client hung up while it sent the body")
        return Response(status_code=499)
    recording.request = ask.body
    upstreams = request.app.state.upstreams
    return RecordedStream(
        Exchange(
            ask=ask,
            plan=plan_routes(ask, settings),
            upstreams=upstreams,
            headers={name: _headers_for(request, name) for name in upstreams},
            settings=settings,
            recording=recording,
        )
    )


def _refuse(recording: Recording, status: int, message: str, code: str) -> Response:
    recording.finish("error", status, error=message)
    response = error_response(status, message, code)
    response.headers["x-request-id"] = recording.trace_id
    response.headers["x-tatara-route"] = recording.choice.route
    response.headers["x-tatara-reason"] = recording.choice.reason
    return response


async def _read_body(request: Request, limit_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise _TooLargeError
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit_bytes:
            raise _TooLargeError
        pieces.append(piece)
    return b"".join(pieces)


def _headers_for(request: Request, upstream: str) -> dict[str, str]:
    """Choose what goes to a model server. The client's own key goes to vLLM only."""
    settings: Settings = request.app.state.settings
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    headers |= {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
    key = settings.lite_api_key if upstream == "lite" else settings.vllm_api_key
    if key:
        headers["authorization"] = f"Bearer {key}"
    elif upstream == "lite":
        headers.pop("authorization", None)
    return headers
