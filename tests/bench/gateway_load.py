"""The traffic of bench_gateway.py: a mock model server and a load generator, each a process of its own.

    python gateway_load.py mock PORT
    python gateway_load.py whole PORT CONNECTIONS SECONDS        one JSON line: count, wall_s, p50_ms, p99_ms
    python gateway_load.py streams PORT PER_SECOND SECONDS       the same for first chunks and chunk delays

Both are bare asyncio protocols: what they cost is taken from the same two cores.
"""

import asyncio
import json
import sys
import time

SSE_CHUNKS, SSE_GAP_S = 8, 0.01
ASK = {"model": "mock", "messages": [{"role": "user", "content": "祭りについて教えてください。" * 8}], "max_tokens": 64}
WHOLE = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "mock",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "夏祭りだ。" * 20}}],
    "usage": {"prompt_tokens": 40, "completion_tokens": 60, "total_tokens": 100},
}  # fmt: skip


def post(body):
    data = json.dumps(body, ensure_ascii=False).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
    return head + b"authorization: Bearer sk-bench\r\ncontent-length: %d\r\n\r\n" % len(data) + data


class Mock(asyncio.Protocol):
    """Answers every POST at once; a stream one chunk each 10 ms, each with the time at which it was sent."""

    data = json.dumps(WHOLE, ensure_ascii=False).encode()
    whole = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data) + data
    stream = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"

    def connection_made(self, transport):
        self.transport, self.got = transport, b""

    def data_received(self, data):
        self.got += data
        while (end := self.got.find(b"\r\n\r\n")) >= 0:
            head = self.got[:end].lower()
            size = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
            if len(self.got) < end + 4 + size:
                return
            body, self.got = self.got[end + 4 : end + 4 + size], self.got[end + 4 + size :]
            if b'"stream": true' in body or b'"stream":true' in body:
                self.transport.write(self.stream)
                self.send_chunk(0)
            else:
                self.transport.write(self.whole)

    def send_chunk(self, index):
        delta = {
            "role": "assistant",
            "content": f"語{index} sent_ns={time.monotonic_ns()};",
        }  # LiteLLM drops new fields
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "mock"}
        event = head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        data = b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"
        last = index + 1 == SSE_CHUNKS
        data += b"data: [DONE]\n\n" if last else b""
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data) + (b"0\r\n\r\n" if last else b""))
        if not last:
            asyncio.get_running_loop().call_later(SSE_GAP_S, self.send_chunk, index + 1)


class Client(asyncio.Protocol):
    """One keep-alive connection; `ask` gives (seconds, first chunk seconds, chunk delays)."""

    def __init__(self):
        self.answered = asyncio.Event()

    def connection_made(self, transport):
        self.transport = transport

    def ask(self, data):
        self.got, self.size, self.first, self.delays = b"", -1, 0.0, []
        self.answered = asyncio.get_running_loop().create_future()
        self.begin = time.perf_counter()
        self.transport.write(data)
        return self.answered

    def data_received(self, data):
        now_ns = time.monotonic_ns()
        self.got += data
        if self.size < 0:
            end = self.got.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self.got[:end].lower()
            assert b" 200 " in head.partition(b"\r\n")[0], self.got
            length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
            self.size = end + 4 + int(length) if length else 0
        if not self.size:
            for part in data.split(b"sent_ns=")[1:]:
                if (digits := part.partition(b";")[0]).isdigit():
                    self.first = self.first or time.perf_counter() - self.begin
                    self.delays.append((now_ns - int(digits)) / 1e6)
        if len(self.got) == self.size or (not self.size and self.got.endswith(b"0\r\n\r\n")):
            self.answered.set_result((time.perf_counter() - self.begin, self.first, self.delays))

    def connection_lost(self, exc):
        if not self.answered.done():
            self.answered.set_exception(ConnectionError(f"cut after {self.got[-200:]!r}"))


async def connect(port):
    return (await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port))[1]


async def load_whole(port, connections, seconds):
    """Ask again as soon as the answer is there. Each connection's first request, with its accept, is not counted."""
    clients, data = [await connect(port) for _ in range(connections)], post(ASK)
    await asyncio.gather(*(client.ask(data) for client in clients))
    until, taken = time.perf_counter() + seconds, []

    async def run(client):
        while time.perf_counter() < until:
            taken.append((await client.ask(data))[0])

    begin = time.perf_counter()
    await asyncio.gather(*map(run, clients))
    return {"count": len(taken), "wall_s": time.perf_counter() - begin} | quantiles("", taken, 1e3)


async def load_streams(port, per_s, seconds):
    """Open a stream every 1/per_s seconds, however slow the answers are."""
    data, free, taken, running = post(ASK | {"stream": True}), [], [], set()
    free += [await connect(port) for _ in range(min(64, per_s))]

    async def run():
        client = free.pop() if free else await connect(port)
        taken.append(await client.ask(data))
        free.append(client)

    begin = time.perf_counter()
    for index in range(int(per_s * seconds)):
        await asyncio.sleep(max(0.0, begin + index / per_s - time.perf_counter()))
        task = asyncio.create_task(run())
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    delays = [delay for answer in taken for delay in answer[2]]
    assert len(delays) == len(taken) * SSE_CHUNKS, (len(delays), len(taken))
    firsts = quantiles("first_", [answer[1] for answer in taken], 1e3)
    return {"count": len(taken), "wall_s": time.perf_counter() - begin} | firsts | quantiles("delay_", delays, 1.0)


def quantiles(name, values, scale):
    values = sorted(values)
    return {f"{name}p{share}_ms": round(values[len(values) * share // 100] * scale, 2) for share in (50, 99)}


def main():
    import uvloop

    what, port, *numbers = sys.argv[1:]

    async def serve():
        server = await asyncio.get_running_loop().create_server(Mock, "127.0.0.1", int(port), backlog=1024)
        await server.serve_forever()

    if what == "mock":
        uvloop.run(serve())
    load = load_whole if what == "whole" else load_streams
    sys.stdout.write(json.dumps(uvloop.run(load(int(port), int(numbers[0]), float(numbers[1])))))


if __name__ == "__main__":
    main()
