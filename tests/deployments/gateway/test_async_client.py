"""The asynchronous openai client: whole, streamed, many at once, and hanging up in each way that it can."""

import asyncio

import openai
import pytest

SAID = "祭りは fun!"


def run(gateway, work):
    async def inside():
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="sk-secret", max_retries=0) as client:
            return await work(client)

    return asyncio.run(inside())


async def text_of(stream):
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def test_it_works_whole_and_streamed_many_at_once(gateway, chat_body):
    async def work(client):
        create = client.chat.completions.create
        wholes = await asyncio.gather(*(create(**chat_body()) for _ in range(20)))
        streams = await asyncio.gather(*(create(**chat_body(), stream=True) for _ in range(20)))
        said = await asyncio.gather(*map(text_of, streams))
        usage = [chunk.usage async for chunk in await create(
            **chat_body(), stream=True, stream_options={"include_usage": True}
        )]  # fmt: skip
        return [whole.choices[0].message.content for whole in wholes] + said, usage[-1].total_tokens

    assert run(gateway, work) == ([SAID] * 40, 8)


def test_errors_are_its_own_kinds(gateway, chat_body):
    async def work(client):
        with pytest.raises(openai.InternalServerError, match="overloaded"):
            await client.chat.completions.create(**chat_body("error503"))
        with pytest.raises(openai.APIError, match="broke off"):
            await text_of(await client.chat.completions.create(**chat_body("dies"), stream=True))

    run(gateway, work)


async def cancel_whole(client, body):
    task = asyncio.create_task(client.chat.completions.create(**body))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def close_stream(client, body):
    stream = await client.chat.completions.create(**body, stream=True)
    async for _ in stream:
        break
    await stream.close()


async def time_out(client, body):
    with pytest.raises(openai.APITimeoutError):
        await client.chat.completions.create(**body, timeout=0.3)


@pytest.mark.parametrize("hang_up", [cancel_whole, close_stream, time_out])
def test_hanging_up_cancels_the_request_in_the_model_server(gateway, upstream, chat_body, wait_until, hang_up):
    before, known = upstream.get("/seen")["cancelled"], {trace["trace_id"] for trace in gateway.traces()}

    async def work(client):
        await hang_up(client, chat_body("hangs"))
        # the client lives on: it is the request that was given up, not the connection pool
        await asyncio.to_thread(wait_until, lambda: upstream.get("/seen")["cancelled"] == before + 1, 5)
        return (await client.chat.completions.create(**chat_body())).choices[0].message.content

    assert run(gateway, work) == SAID
    [trace] = [each for each in gateway.traces() if each["trace_id"] not in known and each["status"] != "ok"]
    assert (trace["status"], trace["http_status"], trace["error"]) == ("cancelled", 499, "the client hung up")
