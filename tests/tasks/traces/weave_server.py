"""A stand-in for Weave's trace server: `python weave_server.py PORT`.

Like the real one, and unlike its in-memory stand-in, it keeps every copy that it is sent: a row per
arrival. `/misbehave {"next": [...], "delay_s": 0}` sets what the next requests to `complete` do:
"503-stored", "503", "429", "timeout-stored", "dies-stored" (the connection, after it stored), "dies",
"413", "ok"; "query": [...] does the same for `stream_query`. A call whose inputs hold "poison" is
refused with its whole batch, one beyond 3.5 MiB with 413. `/ids` counts the rows of each id.
"""

import asyncio
import json
import sys
from collections import Counter

from aiohttp import web

ROWS = []
PLAN = {"next": [], "query": [], "delay_s": 0.0, "requests": 0, "auth": None, "retry_after": "0.05"}


async def complete(request):
    PLAN["requests"] += 1
    PLAN["auth"] = request.headers.get("Authorization")
    raw = await request.read()
    batch = json.loads(raw)["batch"]
    how = PLAN["next"].pop(0) if PLAN["next"] else "ok"
    if how in ("401", "404"):
        return web.Response(status=int(how))
    if how == "429":
        return web.Response(status=429, headers={"Retry-After": PLAN["retry_after"]})
    if how == "503":
        return web.Response(status=503)
    if how == "413":
        return web.Response(status=413, text="told to")
    if how == "dies":
        request.transport.abort()
        return web.Response()
    if len(batch) > 1000 or any(len(json.dumps(call)) > 3.5 * (1 << 20) for call in batch):
        return web.Response(status=413, text="too large")
    if any("poison" in json.dumps(call["inputs"]) for call in batch):
        return web.Response(status=422, text="poison in the batch")
    assert all(
        call["project_id"] == f"{request.match_info['entity']}/{request.match_info['project']}" for call in batch
    )
    await asyncio.sleep(PLAN["delay_s"])
    ROWS.extend(batch)
    if how == "timeout-stored":
        await asyncio.sleep(3600)
    if how == "dies-stored":
        request.transport.abort()
    return web.Response(status=503) if how == "503-stored" else web.json_response({})


async def stream_query(request):
    query = await request.json()
    if (PLAN["query"].pop(0) if PLAN["query"] else "ok") == "503":
        return web.Response(status=503)
    wanted = set(query["filter"]["call_ids"])
    found = {row["id"]: row for row in ROWS if row["id"] in wanted and row["project_id"] == query["project_id"]}
    lines = [json.dumps({name: row.get(name) for name in query["columns"]}) + "\n" for row in found.values()]
    return web.Response(text="".join(lines))


async def misbehave(request):
    PLAN.update(json.loads(await request.read()))
    return web.Response()


async def rows(request):
    return web.json_response(ROWS)


async def ids(request):
    return web.json_response(Counter(row["id"] for row in ROWS))


async def plan(request):
    return web.json_response(PLAN)


def main():
    app = web.Application(client_max_size=1 << 28)
    app.router.add_post("/v2/{entity}/{project}/calls/complete", complete)
    app.router.add_post("/calls/stream_query", stream_query)
    app.router.add_post("/misbehave", misbehave)
    app.router.add_get("/rows", rows)
    app.router.add_get("/ids", ids)
    app.router.add_get("/plan", plan)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None)


if __name__ == "__main__":
    main()
