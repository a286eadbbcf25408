"""The gateway's cold routes, and the descriptions of the hot ones (gateway.py answers those).

Ring: edge.
"""

from typing import Any

from fastapi import APIRouter, Request, Response

from deployments.gateway import metrics, replies
from deployments.gateway.gateway import Gateway
from deployments.gateway.intake import authenticate, read_head
from deployments.gateway.pool import ConnectFailedError
from deployments.gateway.replies import RefusedError
from deployments.gateway.routing import CHAT, COMPLETIONS, EMBEDDINGS, ENDPOINTS, GENERATE, RESPONSES
from deployments.gateway.schemas import describe
from deployments.gateway.upstream import Upstream
from deployments.gateway.wire import BrokenReplyError, SilentServerError

_ABOUT = {
    CHAT: "OpenAI's chat completions, whole or streamed.",
    COMPLETIONS: "OpenAI's text completions, whole or streamed.",
    RESPONSES: "OpenAI's responses, whole or streamed.",
    EMBEDDINGS: "OpenAI's embeddings.",
    GENERATE: "One text in (`input` or `prompt`), one text out (`output`, beside OpenAI's fields).",
}
_MODELS_TIMEOUT_S = 10.0
_BUSY: dict[int | str, dict[str, Any]] = {503: {"description": "no model server answers"}}  # Any: OpenAPI
_KEY: dict[int | str, dict[str, Any]] = {
    401: {"description": "no API key, or an unknown one"},
    **_BUSY,
}  # Any: as above
_TEXT: dict[int | str, dict[str, Any]] = {  # Any: as above
    200: {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {"type": "string"}}}},
    401: _KEY[401],
}
router = APIRouter()


async def _answered_before() -> Response:
    """Stand for a hot route: GatewayApp answers its POST before FastAPI looks at it."""
    return error_response(500, "this route was not taken: mount the application at /", "internal_error")


for _path in ENDPOINTS:
    router.add_api_route(
        _path,
        _answered_before,
        methods=["POST"],
        response_model=None,
        summary=_ABOUT[_path],
        description=_ABOUT[_path],
        operation_id=_path.removeprefix("/v1/").replace("/", "_"),
        openapi_extra=describe(_path),
    )


def _gateway(request: Request) -> Gateway:
    return request.app.state.gateway


def _check_key(request: Request) -> bytes:
    """Return the header lines for a model server. Raises RefusedError without a key where one is asked for."""
    gateway, head = _gateway(request), read_head(request.scope["headers"])
    authenticate(gateway.keys, head.authorization)
    return b"" if gateway.keys is not None else head.authorization


@router.get("/v1/models", response_model=None, responses=_KEY)
async def models(request: Request) -> Response:
    """The models that vLLM serves; the lite server's while vLLM is down."""
    theirs = _check_key(request)
    for upstream in _gateway(request).fleet.all:
        if not upstream.is_down and (response := await _models_of(upstream, theirs)) is not None:
            return response
    return error_response(503, "no model server answers: try again in a moment", "upstream_down")


async def _models_of(upstream: Upstream, authorization: bytes) -> Response | None:
    own = upstream.has_key or upstream.is_lite or not authorization
    try:
        reply, data = await upstream.get(
            "/v1/models", b"" if own else b"authorization: %b\r\n" % authorization, _MODELS_TIMEOUT_S
        )
    except (ConnectFailedError, BrokenReplyError, SilentServerError, TimeoutError):
        return None
    return Response(data, reply.status, media_type=reply.header(b"content-type").decode("latin-1") or None)


@router.get("/health", response_model=None)
async def health(request: Request) -> dict[str, Any]:  # Any: flags and counts
    """200 as long as the gateway lives; says whether vLLM does, and what became of the traces."""
    gateway = _gateway(request)
    own = {"lite_processes": gateway.lite.counts()} if gateway.lite else {}
    alive = await gateway.fleet.health()
    return {"gateway": "ok", **alive, **own, **gateway.shares(), "traces": gateway.recorder.counts()}


@router.get("/ready", response_model=None, responses=_BUSY)
async def ready(request: Request) -> Response:
    """200 when a model can answer, else 503; also while the gateway is about to stop."""
    gateway = _gateway(request)
    alive = [name for name, up in (await gateway.fleet.health()).items() if up]
    if gateway.is_draining:
        return error_response(503, "the gateway is stopping", "stopping")
    if alive:
        return Response(replies.encode({"ready": True, "models": alive}), media_type="application/json")
    return error_response(503, "no model server answers", "not_ready")


@router.get("/metrics", response_model=None, responses=_TEXT)
async def prometheus(request: Request) -> Response:
    """Counts and times in Prometheus' text format. With API keys it asks for one."""
    _check_key(request)
    gateway = _gateway(request)
    servers = [*gateway.fleet.all, *gateway.fleet.leaving]
    gauges = {
        "in_flight": {"": float(gateway.gate.num_running)},
        "waiting": {"": float(gateway.gate.num_waiting)},
        "upstream_up": {f'upstream="{server.name}"': float(not server.is_down) for server in servers},
        "upstream_in_flight": {f'upstream="{server.name}"': float(server.num_running) for server in servers},
        "upstream_weight": {f'upstream="{each.name}"': each.weight for each in gateway.fleet.routes["vllm"]},
        "upstream_answered": {f'upstream="{server.name}"': float(server.counts.answered) for server in servers},
        "upstream_failed": {f'upstream="{server.name}"': float(server.counts.failed) for server in servers},
        "upstream_seconds": {f'upstream="{server.name}"': server.counts.seconds for server in servers},
    }
    if gateway.lite:
        restarts = {f'upstream="{each["name"]}"': float(each["restarts"]) for each in gateway.lite.counts()}
        gauges["lite_restarts"] = restarts
    return Response(gateway.metrics.text(gauges, gateway.recorder.counts()), media_type=metrics.CONTENT_TYPE)


def error_response(status: int, message: str, code: str) -> Response:
    """Return an error in OpenAI's shape."""
    return refusal(RefusedError(status, message, code, replies.RETRY_SOON if status == 503 else ()))


def refusal(refused: RefusedError) -> Response:
    """Return a refusal in OpenAI's shape."""
    body = replies.encode(replies.error_body(refused.status, str(refused), refused.code))
    headers = {name.decode(): value.decode() for name, value in refused.headers}
    return Response(body, refused.status, headers, media_type="application/json")
