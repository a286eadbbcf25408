"""Weave's own trace server on loopback: `.venv-weave/bin/python trace_server.py PORT FOLDER`.

    HTTP -> basic auth -> fault -> ExternalTraceServer -> ClickHouseTraceServer -> chDB in FOLDER

The classes that W&B runs, from the published wheel with its migrations; W&B publishes no HTTP app,
so the routes are ours and the answers to errors come from the wheel's own table of statuses.
Merges are off: a call that was sent twice stays two rows, which is what a stand-in hides.

`POST /control` changes the Plan below and `GET /control` tells it; `GET /rows` counts physical rows.
"""

import asyncio
import base64
import binascii
import logging
import os
import sys
import types
from typing import Any, NamedTuple

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else litellm asks the network on import
os.environ.setdefault("WF_CLICKHOUSE_DATABASE", "weave")


class _ProviderInfo(NamedTuple):
    litellm_provider: str
    api_key_name: str


def _stand_in_for_model_providers() -> None:
    """Offer the one module that the wheel imports and does not hold: which LLM vendor has which key."""
    providers = types.ModuleType("weave.trace_server.model_providers.model_providers")
    providers.LLMModelProviderInfo = _ProviderInfo  # type: ignore[attr-defined] # a module made at run time
    providers.VERTEX_PROVIDER_NAMES = frozenset()  # type: ignore[attr-defined]
    providers.read_model_to_provider_info_map = dict  # type: ignore[attr-defined]
    sys.modules["weave.trace_server.model_providers"] = types.ModuleType("weave.trace_server.model_providers")
    sys.modules[providers.__name__] = providers


_stand_in_for_model_providers()

import clickhouse_connect  # noqa: E402 - after the stand-in
import sqlparse.engine.grouping  # noqa: E402
import uvicorn  # noqa: E402
from fastapi import FastAPI, Request, Response  # noqa: E402
from fastapi.concurrency import run_in_threadpool  # noqa: E402
from fastapi.responses import JSONResponse, StreamingResponse  # noqa: E402
from pydantic import BaseModel  # noqa: E402
from weave.trace_server import trace_server_interface as tsi  # noqa: E402
from weave.trace_server.clickhouse_trace_server_batched import ClickHouseTraceServer  # noqa: E402
from weave.trace_server.errors import (  # noqa: E402
    ProjectNotFound,
    get_registered_error_classes,
    handle_server_exception,
)
from weave.trace_server.external_to_internal_trace_server_adapter import (  # noqa: E402
    ExternalTraceServer,
    IdConverter,
)

sqlparse.engine.grouping.MAX_GROUPING_TOKENS = None  # a migration holds more than sqlparse's 10,000 tokens
KEY = "0123456789abcdef0123456789abcdef01234567"
ENTITY, USER = "team", "somebody"


class Plan(BaseModel):
    """What goes wrong: `next` holds one entry per coming request to /calls/complete.

    "503-stored", "hang-stored" and "cut-stored" (an answer that breaks off) store first; "429", "cut"
    and any other status as a number don't. `next_query` is the same for /calls/stream_query.
    """

    next: list[str] = []
    next_query: list[str] = []
    delay_s: float = 0.0
    retry_after: str = "0.05"
    max_body_bytes: int = 31 << 20
    num_calls: list[int] = []  # of each request that came this far


class Ids(IdConverter):
    """Projects of one team, made when first named; "absent" is never there."""

    def ext_to_int_project_id(self, project_id: str) -> str:
        entity, _, project = project_id.partition("/")
        if entity != ENTITY or project == "absent":
            raise ProjectNotFound(f"Project {project_id} not found")
        number = int.from_bytes(project.encode(), "big")
        return base64.b64encode(f"ProjectInternalId:{number}".encode()).decode()

    def int_to_ext_project_id(self, project_id: str) -> str | None:
        number = int(base64.b64decode(project_id).decode().partition(":")[2])
        return f"{ENTITY}/{number.to_bytes((number.bit_length() + 7) // 8, 'big').decode()}"

    def ext_to_int_run_id(self, run_id: str) -> str:
        return run_id

    int_to_ext_run_id = ext_to_int_user_id = int_to_ext_user_id = ext_to_int_run_id


class ChdbTraceServer(ClickHouseTraceServer):
    """The production server on a database in this process."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        super().__init__(host="", database=os.environ["WF_CLICKHOUSE_DATABASE"])

    def _mint_client(self, send_receive_timeout: int | None = None) -> Any:  # Any: clickhouse-connect's client
        client = clickhouse_connect.get_client(interface="chdb", path=self._folder)
        self._ensure_database(client)
        client.database = self._database
        return client


def main(port: int, folder: str) -> None:
    """Migrate the database, then serve until killed."""
    logging.disable(logging.ERROR)  # the server logs each query
    inner = ChdbTraceServer(folder)
    inner._run_migrations()
    inner.ch_client.command("SYSTEM STOP MERGES")
    # The same for the moment between a later start on this folder and the line above.
    inner.ch_client.command("ALTER TABLE calls_complete MODIFY SETTING max_bytes_to_merge_at_max_space_in_pool = 1")
    app = make_app(ExternalTraceServer(inner, Ids()), inner)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=1)


def make_app(server: ExternalTraceServer, inner: ChdbTraceServer) -> FastAPI:
    """Put HTTP in front of a trace server."""
    app = FastAPI()
    app.state.plan = Plan()
    app.add_middleware(Guard, app=app)
    for kind in [*get_registered_error_classes(), Exception]:
        app.exception_handler(kind)(_explain)
    _add_calls(app, server)
    _add_costs(app, server)
    _add_control(app, inner)
    return app


def _explain(request: Request, error: Exception) -> Response:
    known = handle_server_exception(error)
    return JSONResponse(known.message, known.status_code)


class Guard:
    """Let in who knows the key, and no body above the limit."""

    def __init__(self, inner: Any, app: FastAPI) -> None:  # Any: ASGI, here and below
        self._inner = inner
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refusal = self._judge(Request(scope)) if scope["type"] == "http" else None
        await (refusal or self._inner)(scope, receive, send)

    def _judge(self, request: Request) -> Response | None:
        path = request.url.path
        if path in ("/control", "/rows", "/health"):
            return None
        if _credentials(request.headers.get("authorization", "")) != ("api", KEY):
            return JSONResponse({"reason": "API key is not valid"}, 401)
        if path.startswith("/v2/") and path.split("/")[2] != ENTITY:
            return JSONResponse({"reason": "Forbidden"}, 403)
        if int(request.headers.get("content-length", 0)) > self._app.state.plan.max_body_bytes:
            return JSONResponse({"reason": "Request too large"}, 413)
        return None


def _credentials(header: str) -> tuple[str, str]:
    try:
        user, _, key = base64.b64decode(header.removeprefix("Basic ")).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return "", ""
    return user, key


def _add_calls(app: FastAPI, server: ExternalTraceServer) -> None:
    @app.post("/v2/{entity}/{project}/calls/complete")
    async def calls_complete(req: tsi.CallsUpsertCompleteReq) -> Response:
        plan: Plan = app.state.plan
        plan.num_calls.append(len(req.batch))
        how = plan.next.pop(0) if plan.next else "ok"
        if how == "429":
            return JSONResponse({"reason": "Rate limited"}, 429, headers={"Retry-After": plan.retry_after})
        if how == "cut":
            return Cut()
        if how.isdecimal():
            return JSONResponse({"reason": "Not today"}, int(how))
        await asyncio.sleep(plan.delay_s)
        await run_in_threadpool(server.calls_complete, req)
        if how == "hang-stored":
            await asyncio.sleep(3600)
        if how == "cut-stored":
            return Cut()
        return JSONResponse({}, 503 if how == "503-stored" else 200)

    @app.post("/calls/stream_query")
    def stream_query(req: tsi.CallsQueryReq) -> Response:
        plan: Plan = app.state.plan
        how = plan.next_query.pop(0) if plan.next_query else "ok"
        if how.isdecimal():
            return JSONResponse({"reason": "Not today"}, int(how))
        lines = [call.model_dump_json() + "\n" for call in server.calls_query_stream(req)]
        return StreamingResponse(iter(lines), media_type="application/jsonl")

    @app.post("/calls/query_stats")
    def query_stats(req: tsi.CallsQueryStatsReq) -> tsi.CallsQueryStatsRes:
        return server.calls_query_stats(req)

    @app.post("/call/read")
    def call_read(req: tsi.CallReadReq) -> tsi.CallReadRes:
        return server.call_read(req)


def _add_costs(app: FastAPI, server: ExternalTraceServer) -> None:
    @app.post("/cost/create")
    def cost_create(req: tsi.CostCreateReq) -> tsi.CostCreateRes:
        return server.cost_create(req.model_copy(update={"wb_user_id": USER}))

    @app.post("/cost/query")
    def cost_query(req: tsi.CostQueryReq) -> tsi.CostQueryRes:
        return server.cost_query(req)


def _add_control(app: FastAPI, inner: ChdbTraceServer) -> None:
    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/control")
    def tell() -> Plan:
        return app.state.plan

    @app.post("/control")
    def change(plan: Plan) -> Plan:
        app.state.plan = plan
        return plan

    @app.get("/rows")
    def rows(project: str) -> dict[str, int]:
        found = inner.ch_client.query(
            "SELECT id, count() FROM calls_complete WHERE project_id = {project:String} GROUP BY id",
            parameters={"project": Ids().ext_to_int_project_id(f"{ENTITY}/{project}")},
        )
        return dict(found.result_rows)


class Cut(Response):
    """Promise two bytes and send none: uvicorn then closes the connection."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
