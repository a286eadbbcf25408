"""What a request to the lite model asks for, checked.

    body in OpenAI's shape -> read_wish() -> Wish -> model.py

Ring: pure.  Units: tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_CHAT_TOKENS, _COMPLETION_TOKENS = 512, 16  # where the request names no bound; 16 is OpenAI's own
_BEYOND = ("tools", "functions", "logprobs", "top_logprobs", "prompt_logprobs", "response_format", "suffix", "echo")
_HARMLESS = (None, False, 0, [], {}, "", {"type": "text"})
Json = dict[str, Any]  # Any: a body in OpenAI's shape, which grows without us


class AskError(ValueError):
    """The request is not one that the lite model answers; the message is meant for the client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is to be answered, and how. `messages` or `prompt` (text or token ids), never both."""

    messages: list[Json] | None
    prompt: str | list[int] | None
    max_tokens: int
    temperature: float | None  # None: the model's own
    top_p: float | None
    seed: int | None
    stop: tuple[str, ...]
    streams: bool
    with_usage: bool
    effort: str | None


def read_wish(path: str, body: Any) -> Wish:  # Any: whatever the client sent
    """Check a body. Raises AskError.

    >>> read_wish(COMPLETIONS, {"prompt": "hi", "stop": "."}).stop
    ('.',)
    """
    if not isinstance(body, dict):
        raise AskError("the body is no JSON object")
    for name in _BEYOND:
        if body.get(name) not in _HARMLESS:
            raise AskError(f"the lite model knows no {name!r}: leave it out, or ask the large model")
    for name in ("n", "best_of"):
        if body.get(name) not in (None, 1):
            raise AskError(f"{name}={body[name]!r}: the lite model gives one answer")
    is_chat = path == CHAT
    options = body.get("stream_options")
    default = _CHAT_TOKENS if is_chat else _COMPLETION_TOKENS
    return Wish(
        messages=_messages(body.get("messages")) if is_chat else None,
        prompt=None if is_chat else _prompt(body.get("prompt")),
        max_tokens=_whole(body, "max_completion_tokens", 1, None) or _whole(body, "max_tokens", 1, None) or default,
        temperature=_number(body, "temperature", lambda value: 0 <= value <= 2, "0..2"),
        top_p=_number(body, "top_p", lambda value: 0 < value <= 1, "more than 0 and at most 1"),
        seed=_whole(body, "seed", -(1 << 63), 1 << 63),
        stop=_stop(body.get("stop")),
        streams=bool(body.get("stream")),
        with_usage=isinstance(options, Mapping) and bool(options.get("include_usage")),
        effort=body["reasoning_effort"] if isinstance(body.get("reasoning_effort"), str) else None,
    )


def _messages(value: Any) -> list[Json]:  # Any: whatever the client sent
    if not isinstance(value, list) or not value:
        raise AskError("'messages' is no list of messages")
    return [_message(index, message) for index, message in enumerate(value)]


def _message(index: int, message: Any) -> Json:  # Any: as above
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise AskError(f"messages[{index}] is no object with a 'role'")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise AskError(f"messages[{index}] holds more than text, which is all that the lite model reads")
        content = "".join(part for part in parts if part)
    if not isinstance(content, str):
        raise AskError(f"messages[{index}] has no text as 'content'")
    return {"role": message["role"], "content": content}


def _prompt(value: Any) -> str | list[int]:  # Any: as above
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(token) is int and token >= 0 for token in value):
        return value
    raise AskError("'prompt' is neither one text nor one list of token ids")


def _stop(value: Any) -> tuple[str, ...]:  # Any: as above
    found = [value] if isinstance(value, str) else value or []
    if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
        raise AskError("'stop' is neither a text nor a list of texts")
    return tuple(found)


def _whole(body: Json, name: str, low: int, beyond: int | None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or value < low or (beyond is not None and value >= beyond):
        raise AskError(f"{name}={value!r}: expected a whole number from {low}")
    return value


def _number(body: Json, name: str, fits: Callable[[float], bool], expected: str) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
        raise AskError(f"{name}={value!r}: expected {expected}")
    return float(value)
