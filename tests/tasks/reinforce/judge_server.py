"""A judge on loopback: answers chat completions as it is told to, and remembers what it was asked."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.ports import free_port


class JudgeServer:
    """`replies` are (status, text) in turn, the last one for ever."""

    def __init__(self, *replies: tuple[int, str]) -> None:
        self.replies, self.asked = list(replies), []
        self.keys: list[str] = []
        self.url = ""

    def take(self) -> tuple[int, str]:
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


@contextmanager
def judging(*replies: tuple[int, str]) -> Iterator[JudgeServer]:
    judge = JudgeServer(*replies)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            judge.asked.append((self.path, body))
            judge.keys.append(self.headers.get("authorization", ""))
            status, text = judge.take()
            said: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": text}}]}
            data = json.dumps(said).encode() if status == 200 else text.encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            del args

    port = free_port()
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    judge.url = f"http://127.0.0.1:{port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
