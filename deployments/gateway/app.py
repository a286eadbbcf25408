"""The gateway as an application: `create_app(settings)`; its lifespan owns every client.

    uvicorn --factory deployments.gateway.app:create_app

Ring: edge.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from deployments.gateway.recorder import Recorder
from deployments.gateway.routes import error_response, router
from deployments.gateway.settings import Settings
from deployments.gateway.upstream import Upstream, open_session

logger = logging.getLogger(__name__)


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application. Without settings they come from the environment; faults raise SpecError."""
    chosen = settings or Settings.from_environment(os.environ)
    recorder = Recorder(chosen)
    recorder.open()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_session(chosen) as session:
            upstreams = {"vllm": Upstream("vllm", chosen.vllm_url, session, chosen.probe_interval_s)}
            if chosen.lite_model:
                upstreams["lite"] = Upstream("lite", chosen.lite_model, session, chosen.probe_interval_s)
            recorder.start()
            watchers = [asyncio.create_task(upstream.watch()) for upstream in upstreams.values()]
            app.state.settings, app.state.recorder, app.state.upstreams = chosen, recorder, upstreams
            logger.info("gateway on %s:%d in front of %s", chosen.host, chosen.port, chosen.vllm_url)
            try:
                yield
            finally:
                for watcher in watchers:
                    watcher.cancel()
                await recorder.stop()

    app = FastAPI(title="Tatara gateway", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(router)
    app.add_exception_handler(HTTPException, _say_http_error)
    app.add_exception_handler(Exception, _say_our_error)
    return app


def _say_http_error(request: Request, error: Exception) -> Response:
    """Wrong path or method, in OpenAI's shape."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = {404: "there is no such route", 405: "this route does not take this method"}.get(status, "refused")
    return error_response(status, f"{request.method} {request.url.path}: {what}", "route_error")


def _say_our_error(request: Request, error: Exception) -> Response:
    """A fault of ours: the log has the traceback, the client gets no inside of it."""
    return error_response(500, "the gateway failed; its log says more", "internal_error")
