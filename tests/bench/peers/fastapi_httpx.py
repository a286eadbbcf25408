"""The proxy that one writes first: FastAPI, httpx, nothing recorded: `python fastapi_httpx.py PORT UPSTREAM`.

A peer for tests/bench/bench_gateway.py, written the way the documentation of both libraries shows it.
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask


def make_app(upstream: str) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=1024)
        async with httpx.AsyncClient(base_url=upstream, timeout=600, limits=limits) as client:
            app.state.client = client
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        client: httpx.AsyncClient = app.state.client
        body = await request.json()
        outgoing = client.build_request("POST", "/v1/chat/completions", json=body)
        if not body.get("stream"):
            reply = await client.send(outgoing)
            return Response(reply.content, reply.status_code, media_type=reply.headers.get("content-type"))
        reply = await client.send(outgoing, stream=True)
        close = BackgroundTask(reply.aclose)
        media_type = reply.headers.get("content-type")
        return StreamingResponse(reply.aiter_raw(), reply.status_code, media_type=media_type, background=close)

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[2]), host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)
