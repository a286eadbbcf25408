"""What the gateway itself says: errors, the maintenance answer, and `/v1/generate`'s shape.

Ring: pure.
"""

import json
from collections.abc import Sequence
from typing import Any

from deployments.gateway.routing import COMPLETIONS, GENERATE, Ask

Json = dict[str, Any]  # Any: a body in OpenAI's shape, which grows without us
LITE_MAINTENANCE = "lite-maintenance"
_NO_TOKENS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
JSON = [(b"content-type", b"application/json")]
SSE = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
RETRY_SOON = [(b"retry-after", b"1")]
_KINDS = {400: "invalid_request_error", 404: "not_found_error", 405: "invalid_request_error"} | {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class RefusedError(Exception):
    """The gateway itself answers, with an error; the message is meant for the client."""

    def __init__(self, status: int, message: str, code: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


def error_body(status: int, message: str, code: str) -> Json:
    """Return an error in OpenAI's shape.

    >>> error_body(413, "too large", "body_too_large")["error"]["type"]
    'invalid_request_error'
    """
    return {"error": {"message": message, "type": _KINDS.get(status, "api_error"), "param": None, "code": code}}


def encode(value: Json) -> bytes:
    """Write a body as JSON in UTF-8; half a surrogate pair, which UTF-8 can't hold, is escaped."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def encode_event(value: Json) -> bytes:
    """Write one SSE event."""
    return b"data: " + encode(value) + b"\n\n"


def maintenance_body(ask: Ask, message: str, answer_id: str, created_s: int) -> Json:
    """Return the fixed answer, marked as what it is: no model said this."""
    choice: Json = {"index": 0, "finish_reason": "stop", "logprobs": None}
    if ask.path == COMPLETIONS:
        body = _head("text_completion", answer_id, created_s) | {"choices": [choice | {"text": message}]}
    else:
        said = {"role": "assistant", "content": message}
        body = _head("chat.completion", answer_id, created_s) | {"choices": [choice | {"message": said}]}
    body["usage"] = dict(_NO_TOKENS)
    return with_output(body) if ask.endpoint == GENERATE else body


def maintenance_events(ask: Ask, message: str, answer_id: str, created_s: int) -> list[bytes]:
    """Return the fixed answer as a stream: the text, the end, [DONE]."""
    choice: Json = {"index": 0, "finish_reason": None}
    if ask.path == COMPLETIONS:
        head = _head("text_completion", answer_id, created_s)
        said, end = {"text": message}, {"text": "", "finish_reason": "stop"}
    else:
        head = _head("chat.completion.chunk", answer_id, created_s)
        said = {"delta": {"role": "assistant", "content": message}}
        end = {"delta": {}, "finish_reason": "stop"}
    events = [encode_event(head | {"choices": [choice | part]}) for part in (said, end)]
    return [*events, b"data: [DONE]\n\n"]


def _head(kind: str, answer_id: str, created_s: int) -> Json:
    return {
        "id": answer_id,
        "object": kind,
        "created": created_s,
        "model": LITE_MAINTENANCE,
        "tatara": {"route": "maintenance"},
    }


def with_output(body: Json) -> Json:
    """Put the answer's text first as `output`, the way `/v1/generate` returns it.

    >>> with_output({"choices": [{"message": {"content": "hi"}}]})["output"]
    'hi'
    """
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = first.get("message")
    text = message.get("content") if isinstance(message, dict) else first.get("text")
    return {"output": text if isinstance(text, str) else ""} | body
