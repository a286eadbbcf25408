"""What the hot routes take, for /openapi.json.

The gateway reads of a body only what routing needs and passes everything on, so these schemas describe and
do not refuse: the model server decides. Fields are those that clients use most; more are allowed.

Ring: pure.
"""

from typing import Any

from deployments.gateway.routing import CHAT, COMPLETIONS, EMBEDDINGS, GENERATE, RESPONSES

Schema = dict[str, Any]  # Any: JSON Schema

_SAMPLING: Schema = {
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1},
    "stream": {"type": "boolean", "default": False, "description": "answer as server-sent events"},
}
_MODEL: Schema = {"model": {"type": "string", "description": "the served model's name, see /v1/models"}}
_LEGACY: Schema = {
    **_SAMPLING,
    "max_tokens": {"type": "integer", "minimum": 1},
    "n": {"type": "integer", "minimum": 1},
    "stop": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    "seed": {"type": "integer"},
    "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
}
_MESSAGE: Schema = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]},
    },
}
_TOOLS: Schema = {"type": "array", "items": {"type": "object"}}
_TEXTS: Schema = {"anyOf": [{"type": "string"}, {"type": "array"}]}


def _object(required: list[str], properties: Schema) -> Schema:
    return {"type": "object", "required": required, "properties": {**_MODEL, **properties}}


REQUESTS: dict[str, Schema] = {
    CHAT: _object(
        ["model", "messages"],
        {
            "messages": {"type": "array", "minItems": 1, "items": _MESSAGE},
            **_LEGACY,
            "max_completion_tokens": {"type": "integer", "minimum": 1},
            "tools": _TOOLS,
            "response_format": {"type": "object"},
            "logprobs": {"type": "boolean"},
            "reasoning_effort": {"enum": ["low", "medium", "high"]},
        },
    ),
    COMPLETIONS: _object(["model", "prompt"], {"prompt": _TEXTS, **_LEGACY}),
    RESPONSES: _object(
        ["model", "input"],
        {
            "input": _TEXTS,
            "instructions": {"type": "string"},
            "max_output_tokens": {"type": "integer", "minimum": 1},
            "tools": _TOOLS,
            **_SAMPLING,
        },
    ),
    EMBEDDINGS: _object(["model", "input"], {"input": _TEXTS, "encoding_format": {"enum": ["float", "base64"]}}),
    GENERATE: {
        "type": "object",
        "anyOf": [{"required": ["input"]}, {"required": ["prompt"]}, {"required": ["messages"]}],
        "properties": {**_MODEL, "input": {"type": "string"}, "prompt": {"type": "string"}, **_LEGACY},
    },
}
ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")},
        }
    },
}
_REFUSALS = {
    400: "the body can't be read",
    401: "no API key, or one that is not known",
    403: "the key may not ask this",
    404: "no such model; the model server's own errors pass through",
    408: "the body came too slowly",
    413: "the body is too large",
    422: "the model server does not take it",
    429: "the key's budget is used up",
    502: "the model server broke off",
    503: "no model server answers, or the gateway is busy",
    504: "the model server said nothing for too long",
}


def describe(endpoint: str) -> Schema:
    """Return the OpenAPI operation of a hot route: body and answers."""
    whole: Schema = {"application/json": {"schema": {"type": "object"}}}
    stream: Schema = {} if endpoint == EMBEDDINGS else {"text/event-stream": {"schema": {}}}
    answers: Schema = {"200": {"description": "the answer, in OpenAI's shape", "content": {**whole, **stream}}}
    for status, about in _REFUSALS.items():
        answers[str(status)] = {"description": about, "content": {"application/json": {"schema": {"type": "object"}}}}
    body = {"required": True, "content": {"application/json": {"schema": REQUESTS[endpoint]}}}
    return {"requestBody": body, "responses": answers, "security": [{}, {"bearer": []}]}
