"""What vLLM answers at /v1/completions, by a tiny model of transformers in a thread of this process.

Tokens in, prompt log-probabilities and greedy tokens out, in vLLM's form; for lm-eval OpenAI's `echo` with `logprobs`.
It computes by itself, with none of the code that is tested.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import torch

from tests.ports import free_port


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"  # pyright: ignore[reportIncompatibleVariableOverride]  # set by the server itself

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        status, reply = self.server.failure or (200, {"choices": self.server.answer(body)})
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, model: Any, tokenizer: Any) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.model, self.tokenizer = model, tokenizer
        self.url = f"http://127.0.0.1:{port}"
        self.bodies: list[dict[str, Any]] = []
        self.failure: tuple[int, dict[str, Any]] | None = None
        self._lock = Lock()

    def answer(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        prompts = body["prompt"]
        if isinstance(prompts, str):
            prompts = [self.tokenizer(prompts).input_ids]
        elif isinstance(prompts[0], int):
            prompts = [prompts]
        with self._lock, torch.no_grad():
            return [self._choice(index, ids, body) for index, ids in enumerate(prompts)]

    def _choice(self, index: int, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        said = list(ids)
        for _ in range(body["max_tokens"]):
            said.append(int(self.model(torch.tensor([said])).logits[0, -1].argmax()))
            if said[-1] in body.get("stop_token_ids", ()):
                break
        choice: dict[str, Any] = {"index": index, "text": self.tokenizer.decode(said[len(ids) :])}
        if body.get("return_token_ids"):
            choice["token_ids"] = said[len(ids) :]
        table = self.model(torch.tensor([said])).logits[0].log_softmax(-1)
        if "prompt_logprobs" in body:
            entries = [{str(token): {"logprob": table[place, token].item()}} for place, token in enumerate(ids[1:])]
            choice["prompt_logprobs"] = [None, *entries]
        if body.get("echo"):
            names = [f"token_id:{token}" for token in said]
            values = [table[place, token].item() for place, token in enumerate(said[1:])]
            best = [{f"token_id:{row.argmax().item()}": row.max().item()} for row in table[:-1]]
            choice["logprobs"] = {
                "tokens": names,
                "token_logprobs": [None, *values],
                "top_logprobs": [
                    None,
                    *[{**top, name: value} for top, name, value in zip(best, names[1:], values, strict=True)],
                ],
            }
        return choice


@contextmanager
def serve(model: Any, tokenizer: Any) -> Iterator[_Server]:
    """Serve a model until the body ends."""
    server = _Server(free_port(), model, tokenizer)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
