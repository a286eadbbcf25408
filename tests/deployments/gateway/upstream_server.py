"""A small OpenAI-compatible server in its own process: `python upstream_server.py PORT`.

What a request asks for decides how it is answered, so one server plays every part:
`model` = slow | error503 | dies | dies-inside | dies-before | hangs | malformed | anything else: answers.
`/seen` tells what arrived and how it ended.
"""

import asyncio
import json
import sys

from aiohttp import web

WORDS = ["祭", "り", "は", " fun", "!"]
SEEN = {"requests": [], "cancelled": 0, "finished": 0}


def chunk(model, delta, finish=None, kind="chat.completion.chunk"):
    key = {"text": delta.get("content", "")} if kind == "text_completion" else {"delta": delta}
    choice = {"index": 0, "finish_reason": finish, "logprobs": None} | key
    return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": model, "choices": [choice]}


async def stream(request, body, kind):
    model = body["model"]
    reply = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
    await reply.prepare(request)
    pause = 0.15 if model == "slow" else 0.0
    try:
        for index, word in enumerate([{"role": "assistant", "reasoning_content": "考え"}, *WORDS]):
            delta = word if isinstance(word, dict) else {"content": word}
            await reply.write(b"data: " + json.dumps(chunk(model, delta, kind=kind)).encode() + b"\n\n")
            if model == "malformed":
                await reply.write(b"data: {not json\n\n: a comment\n\n")
            if index == 2 and model == "dies-inside":
                await reply.write(b'data: {"cho')
            if index == 2 and model.startswith("dies"):
                await asyncio.sleep(0.05)
                request.transport.abort()
                return reply
            await asyncio.sleep(pause if model != "hangs" or index < 2 else 3600)
        end = chunk(model, {}, "stop", kind) | {
            "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
        }
        await reply.write(b"data: " + json.dumps(end).encode() + b"\n\n")
        await reply.write(b"data: [DONE]\n\n")
        SEEN["finished"] += 1
    except (ConnectionResetError, asyncio.CancelledError):
        SEEN["cancelled"] += 1
        raise
    return reply


async def answer(request):
    body = await request.json()
    SEEN["requests"].append(
        {"path": request.path, "headers": {k.lower(): v for k, v in request.headers.items()}, "body": body}
    )
    model = body.get("model", "none")
    chat = request.path.endswith("chat/completions")
    if model == "error503":
        return web.json_response(
            {"error": {"message": "overloaded", "type": "x"}}, status=503, headers={"Retry-After": "7"}
        )
    if model == "dies-before":
        request.transport.abort()
        return web.Response()
    if body.get("stream"):
        return await stream(request, body, "chat.completion.chunk" if chat else "text_completion")
    try:
        if model in ("slow", "hangs"):
            await asyncio.sleep(0.5 if model == "slow" else 3600)
    except asyncio.CancelledError:
        SEEN["cancelled"] += 1
        raise
    if model == "dies-inside":
        reply = web.StreamResponse(headers={"content-type": "application/json", "content-length": "1000"})
        await reply.prepare(request)
        await reply.write(b'{"id": ')
        request.transport.abort()
        return reply
    text = "".join(WORDS)
    choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    SEEN["finished"] += 1
    return web.json_response(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion" if chat else "text_completion",
            "created": 1,
            "model": model,
            "choices": [choice | {"index": 0, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
        }
    )


async def models(request):
    return web.json_response({"object": "list", "data": [{"id": "tiny", "object": "model", "owned_by": "vllm"}]})


async def seen(request):
    return web.json_response(SEEN)


async def health(request):
    return web.Response()


def main():
    app = web.Application(client_max_size=1 << 28)
    app.router.add_post("/v1/chat/completions", answer)
    app.router.add_post("/v1/completions", answer)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/seen", seen)
    app.router.add_get("/health", health)
    web.run_app(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        print=None,
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=0.2,
    )


if __name__ == "__main__":
    main()
