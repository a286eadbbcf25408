"""The gateway as an application: `create_app(settings)`; its lifespan owns every client.

    uvicorn --factory deployments.gateway.app:create_app

    POST to a hot route -> Gateway (raw ASGI)          everything else -> FastAPI

Ring: edge.
"""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import CoroutineType
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from deployments.gateway.exchange import Exchange
from deployments.gateway.gateway import Gateway
from deployments.gateway.replies import RefusedError
from deployments.gateway.routes import error_response, refusal, router
from deployments.gateway.routing import ENDPOINTS
from deployments.gateway.settings import Settings

_HOT = frozenset(ENDPOINTS)
logger = logging.getLogger(__name__)


class GatewayApp(FastAPI):
    """FastAPI, with the hot routes taken out before its middleware."""

    gateway: Gateway

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> "CoroutineType[Any, Any, None]":
        """See ASGI. Returns the coroutine itself: one less to go through at each step of a request."""
        if scope["type"] == "http" and scope["path"] in _HOT and scope["method"] == "POST":
            return Exchange(self.gateway, scope["path"], scope).run(receive, send)
        if scope["type"] == "http" and scope["method"] == "HEAD":  # the server leaves out the body
            scope = {**scope, "method": "GET"}
        return super().__call__(scope, receive, send)


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application. Without settings they come from the environment; faults raise SpecError."""
    chosen = settings or Settings.from_environment(os.environ)
    chosen.check_exposure()  # here too: uvicorn --factory does not pass through __main__
    gateway = Gateway(chosen)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        servers = ", ".join(map(str, chosen.vllm_url))
        logger.info("gateway on %s:%d in front of %s", chosen.host, chosen.port, servers)
        try:
            yield
        finally:
            await gateway.stop()

    app = GatewayApp(
        title="Tatara gateway",
        description="OpenAI-compatible, in front of vLLM; one trace per request.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.gateway = app.state.gateway = gateway
    app.include_router(router)
    app.add_exception_handler(HTTPException, _say_http_error)
    app.add_exception_handler(RefusedError, _say_refused)
    app.add_exception_handler(Exception, _say_our_error)
    return app


def _say_http_error(request: Request, error: Exception) -> Response:
    """Wrong path or method, in OpenAI's shape."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = {404: "there is no such route", 405: "this route does not take this method"}.get(status, "refused")
    response = error_response(status, f"{request.method} {request.url.path}: {what}", "route_error")
    if isinstance(error, HTTPException) and error.headers:
        response.headers.update(error.headers)  # Allow
    return response


def _say_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return refusal(error)


def _say_our_error(request: Request, error: Exception) -> Response:
    """A fault of ours: the log has the traceback, the client gets no inside of it."""
    return error_response(500, "the gateway failed; its log says more", "internal_error")
