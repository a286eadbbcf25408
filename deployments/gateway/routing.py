"""Read a request once, and decide who answers it.

    raw body -> read_ask() -> Ask -> plan_routes() -> [Choice, ...], tried in turn until one answers

Short single-turn prompts go to lite when there is one; everything else to vLLM. A short prompt with
no lite model goes to vLLM as well: the first Lite Gateway answered it with a fixed text while the
model was up, which `LITE_CANNED=true` brings back.

Ring: pure.  Units: characters.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from deployments.gateway.fast_json import loads
from deployments.gateway.settings import Settings

Route = Literal["vllm", "lite", "maintenance", "none"]
Json = dict[str, Any]  # Any: a body in OpenAI's shape, which grows without us

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/v1/generate"
RESPONSES, EMBEDDINGS = "/v1/responses", "/v1/embeddings"
ENDPOINTS = (CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS, GENERATE)
_BEYOND_LITE = (
    ("tools", ("tools", "functions", "tool_choice", "function_call")),
    ("logprobs", ("logprobs", "top_logprobs", "prompt_logprobs")),
    ("response-format", ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_grammar")),
    ("stream-options", ("stream_options",)),
)
_NOT_OURS = frozenset({"tools", "logprobs", "response-format", "several-answers"})  # transformers answers none of them
_ALL_BEYOND_LITE = frozenset(name for _, names in _BEYOND_LITE for name in names)
_ONLY_VLLM = {RESPONSES: "responses", EMBEDDINGS: "embeddings"}
_TEXT_FIELDS = ("input", "prompt")


class BadRequestError(ValueError):
    """The request can't be read; the message is meant for the client."""


@dataclass(slots=True)  # not frozen: one is made per request, and freezing trebles what that costs
class Ask:
    """One request: `raw` goes to `path` of a model server unchanged, `body` is the same, read."""

    endpoint: str
    path: str
    raw: bytes
    body: Json

    @property
    def streams(self) -> bool:
        """Whether the client asked for a stream."""
        return bool(self.body.get("stream"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A route and why it was taken; both are told to the client and kept in the trace."""

    route: Route
    reason: str
    headers: tuple[tuple[bytes, bytes], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        said = (b"x-tatara-route", self.route.encode()), (b"x-tatara-reason", self.reason.encode())
        object.__setattr__(self, "headers", said)


def read_ask(endpoint: str, raw: bytes) -> Ask:
    """Parse a body. Raises BadRequestError when it is no JSON object.

    `/v1/generate` becomes a chat of one message: `input` or `prompt` is what the user said, every
    other field is passed on.
    """
    try:
        body = loads(raw)
    except UnicodeDecodeError as error:
        raise BadRequestError(f"the body is not UTF-8 (byte {error.start}): send JSON in UTF-8") from None
    except RecursionError:
        raise BadRequestError("the body is nested too deeply to be a request") from None
    except ValueError as error:
        raise BadRequestError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequestError(f"the body is a JSON {type(body).__name__}, expected an object with 'model' and so on")
    if endpoint != GENERATE:
        return Ask(endpoint, endpoint, raw, body)
    chat = _chat_of(body)
    try:
        return Ask(endpoint, CHAT, json.dumps(chat, allow_nan=False).encode(), chat)
    except ValueError as error:
        raise BadRequestError(f"the body holds a number that JSON can't: {error}") from None


def with_usage(ask: Ask) -> bytes | None:
    """Return the body with the wish for token counts in the stream, or None when it needs no such wish.

    Spliced in where that is possible, so that what the client wrote stays as it wrote it.

    >>> with_usage(Ask(CHAT, CHAT, b'{"stream": true}', {"stream": True}))
    b'{"stream": true,"stream_options":{"include_usage":true}}'
    """
    if ask.path not in (CHAT, COMPLETIONS) or ask.body.get("stream") is not True:
        return None
    options = ask.body.get("stream_options")
    if isinstance(options, dict):
        if options.get("include_usage"):
            return None
        more = ask.body | {"stream_options": options | {"include_usage": True}}
        return json.dumps(more, ensure_ascii=True).encode()
    if "stream_options" in ask.body:
        return None if options is not None else json.dumps(ask.body | {"stream_options": _USAGE}).encode()
    return ask.raw.rstrip()[:-1] + b',"stream_options":{"include_usage":true}}'


_USAGE = {"include_usage": True}


def _chat_of(body: Json) -> Json:
    if "messages" in body:
        return body
    text = next((body[name] for name in _TEXT_FIELDS if body.get(name) is not None), None)
    if not isinstance(text, str):
        raise BadRequestError("/v1/generate expects the text to answer in 'input' or 'prompt', as a string")
    rest = {name: value for name, value in body.items() if name not in _TEXT_FIELDS}
    return rest | {"messages": [{"role": "user", "content": text}]}


def why_not_short(ask: Ask, max_chars: int) -> str | None:
    """Return None when a small model can be trusted with this prompt, else what speaks against it."""
    body = ask.body
    if ask.path in _ONLY_VLLM:
        return _ONLY_VLLM[ask.path]
    for reason, names in () if _ALL_BEYOND_LITE.isdisjoint(body) else _BEYOND_LITE:
        for name in names:
            value = body.get(name)  # 0 counts: "logprobs": 0 asks for those of the tokens themselves
            if value is not None and value is not False and value != [] and value != {}:
                return reason
    if body.get("n") not in (None, 1) or body.get("best_of") not in (None, 1):
        return "several-answers"
    text = _single_turn(body.get("messages")) if ask.path == CHAT else body.get("prompt")
    if not isinstance(text, str):
        return "history" if ask.path == CHAT else "prompt-list"
    return None if len(text) <= max_chars else "long-prompt"


def _single_turn(messages: Any) -> str | None:  # Any: whatever the client sent
    """Return the text of [user] or [system, user], or None for anything longer or richer."""
    if not isinstance(messages, list) or not 1 <= len(messages) <= 2:
        return None
    if len(messages) == 1:
        only = messages[0]
        text = only.get("content") if isinstance(only, dict) and only.get("role") == "user" else None
        return text if isinstance(text, str) else None
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    texts = [message.get("content") if isinstance(message, dict) else None for message in messages]
    if roles not in (["system", "user"], ["developer", "user"]):
        return None
    known = [text for text in texts if isinstance(text, str)]
    return "".join(known) if len(known) == len(texts) else None


def plan_routes(ask: Ask, settings: Settings) -> Sequence[Choice]:
    """Return the routes to try, best first; the last one always answers."""
    return plan_for(ask.path, why_not_short(ask, settings.lite_max_chars), settings)


def plan_for(path: str, against: str | None, settings: Settings) -> Sequence[Choice]:
    """Return the plan for a route of the model server and what speaks against lite there."""
    speaks = path not in _ONLY_VLLM  # the maintenance message is a chat or a completion
    if against is None and settings.lite_canned and not settings.lite_model:
        return [Choice(route="maintenance", reason="short-prompt")]
    choices = []
    if against is None and settings.lite_model:
        choices.append(Choice(route="lite", reason="short-prompt"))
        choices.append(Choice(route="vllm", reason="lite-down"))
    else:
        choices.append(Choice(route="vllm", reason=against or "no-lite-model"))
        if settings.fallback and settings.lite_model and speaks and not (settings.runs_lite and against in _NOT_OURS):
            choices.append(Choice(route="lite", reason="vllm-down"))
    choices.append(Choice(route="maintenance" if settings.fallback and speaks else "none", reason="vllm-down"))
    return choices
