"""The lite model's answers in OpenAI's shape: whole, and as the events of a stream.

Ring: pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from deployments.lite.asked import CHAT, Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What every piece of one answer repeats."""

    path: str
    answer_id: str
    created_s: int
    model: str

    def whole(self, texts: Mapping[str, str], finish: str, usage: Json) -> Json:
        """Return the answer in one piece."""
        choice: Json = {"index": 0, "finish_reason": finish, "logprobs": None}
        if self.path != CHAT:
            choice["text"] = texts["content"]
            return self._named("text_completion") | {"choices": [choice], "usage": usage}
        message: Json = {"role": "assistant", "content": texts["content"]}
        if texts["reasoning"]:
            message["reasoning_content"] = texts["reasoning"]
        return self._named("chat.completion") | {"choices": [choice | {"message": message}], "usage": usage}

    def first(self) -> bytes:
        """Return the event that opens a chat; a completion has none."""
        return self._event({"role": "assistant", "content": ""}, None) if self.path == CHAT else b""

    def piece(self, part: str, text: str) -> bytes:
        """Return the event of some text."""
        name = "reasoning_content" if part == "reasoning" else "content"
        return self._event({name: text}, None)

    def last(self, finish: str, usage: Json | None) -> bytes:
        """Return the events that end a stream; the usage as vLLM sends it, in an event without choices."""
        counted = event(self._named(self._kind()) | {"choices": [], "usage": usage}) if usage else b""
        return self._event({}, finish) + counted + b"data: [DONE]\n\n"

    def _event(self, delta: Json, finish: str | None) -> bytes:
        said = {"delta": delta} if self.path == CHAT else {"text": delta.get("content", "")}
        choice = {"index": 0, "finish_reason": finish, "logprobs": None} | said
        return event(self._named(self._kind()) | {"choices": [choice]})

    def _kind(self) -> str:
        return "chat.completion.chunk" if self.path == CHAT else "text_completion"

    def _named(self, kind: str) -> Json:
        return {"id": self.answer_id, "object": kind, "created": self.created_s, "model": self.model}


def usage_of(num_prompt: int, num_said: int) -> Json:
    """Return the token counts of an answer."""
    return {"prompt_tokens": num_prompt, "completion_tokens": num_said, "total_tokens": num_prompt + num_said}


def error_body(message: str, kind: str, code: str) -> Json:
    """Return an error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def event(value: Json) -> bytes:
    """Write one SSE event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"
