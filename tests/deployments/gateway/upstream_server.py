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
USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
SEEN = {"requests": [], "cancelled": 0, "finished": 0}


def chunk(model, delta, finish=None, kind="chat.completion.chunk"):
    key = {"text": delta.get("content", "")} if kind == "text_completion" else {"delta": delta}
    choice = {"index": 0, "finish_reason": finish, "logprobs": None} | key
    return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": model, "choices": [choice]}


async def stream(request, body, kind):
    model = str(body.get("model", "none"))
    reply = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
    await reply.prepare(request)
    pause = 0.15 if model == "slow" else 0.0
    try:
        while model == "pours":
            await reply.write(b"data: " + json.dumps(chunk(model, {"content": "x" * 60_000})).encode() + b"\n\n")
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
        await reply.write(b"data: " + json.dumps(chunk(model, {}, "stop", kind)).encode() + b"\n\n")
        if (body.get("stream_options") or {}).get("include_usage"):  # as vLLM: one event more, without choices
            end = chunk(model, {}, None, kind) | {"choices": [], "usage": USAGE}
            await reply.write(b"data: " + json.dumps(end).encode() + b"\n\n")
        await reply.write(b"data: [DONE]\n\n")
        SEEN["finished"] += 1
    except (ConnectionResetError, asyncio.CancelledError):
        SEEN["cancelled"] += 1
        raise
    return reply


def note(request, body):
    headers = {name.lower(): value for name, value in request.headers.items()}
    SEEN["requests"] = SEEN["requests"][-50:]
    SEEN["requests"].append({"path": request.path, "headers": headers, "body": body})


async def embed(request):
    body = await request.json()
    note(request, body)
    texts = body["input"] if isinstance(body.get("input"), list) else [body.get("input")]
    data = [{"object": "embedding", "index": index, "embedding": [0.5, -1.0]} for index, _ in enumerate(texts)]
    usage = {"prompt_tokens": 3, "total_tokens": 3}
    return web.json_response({"object": "list", "model": str(body.get("model")), "data": data, "usage": usage})


async def respond(request):
    """`/v1/responses`, whole or as the events that vLLM sends."""
    body = await request.json()
    note(request, body)
    model, text = str(body.get("model")), "".join(WORDS)
    part = {"type": "output_text", "text": text, "annotations": []}
    item = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [part]}
    usage = {"input_tokens": 3, "output_tokens": 5, "total_tokens": 8}
    usage |= {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    whole = {"id": "resp_1", "object": "response", "created_at": 1, "model": model, "parallel_tool_calls": True}
    whole |= {
        "status": "completed",
        "output": [item],
        "usage": usage,
        "tools": [],
        "tool_choice": "auto",
        "error": None,
    }
    if not body.get("stream"):
        return web.json_response(whole)
    reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await reply.prepare(request)
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
    events = [{"type": "response.created", "response": whole | {"status": "in_progress", "output": [], "usage": None}}]
    events += [{"type": "response.output_text.delta", "delta": word, **place} for word in WORDS]
    events += [] if model == "cut" else [{"type": "response.completed", "response": whole}]
    for number, event in enumerate(events):
        data = json.dumps(event | {"sequence_number": number})
        await reply.write(f"event: {event['type']}\ndata: {data}\n\n".encode())
    if model == "cut":
        await asyncio.sleep(0.05)
        request.transport.abort()
    return reply


async def answer(request):
    body = await request.json()
    note(request, body)
    model = str(body.get("model", "none"))
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
            "usage": USAGE,
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
    app.router.add_post("/v1/responses", respond)
    app.router.add_post("/v1/embeddings", embed)
    app.router.add_post("/invocations", answer)  # open on a bare vLLM; the gateway has to hide it
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
