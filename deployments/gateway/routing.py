"""Read a request once, and decide who answers it.

    raw body -> read_ask() -> Ask -> plan_routes() -> [Choice, ...], tried in turn until one answers

Short single-turn prompts go to lite when there is one; everything else to vLLM. A short prompt with
no lite model goes to vLLM as well: the first Lite Gateway answered it with a fixed text while the
model was up, which `LITE_CANNED=true` brings back.

Ring: pure.  Units: characters.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deployments.gateway.settings import Settings

Route = Literal["vllm", "lite", "maintenance", "none"]
Json = dict[str, Any]  # Any: a body in OpenAI's shape, which grows without us

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/v1/generate"
_BEYOND_LITE = (
    ("tools", ("tools", "functions", "tool_choice", "function_call")),
    ("logprobs", ("logprobs", "top_logprobs", "prompt_logprobs")),
    ("response-format", ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_grammar")),
    ("stream-options", ("stream_options",)),
)
_TEXT_FIELDS = ("input", "prompt")


class BadRequestError(ValueError):
    """The request can't be read; the message is meant for the client."""


@dataclass(frozen=True, slots=True, kw_only=True)
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


def read_ask(endpoint: str, raw: bytes) -> Ask:
    """Parse a body. Raises BadRequestError when it is no JSON object.

    `/v1/generate` becomes a chat of one message: `input` or `prompt` is what the user said, every
    other field is passed on.
    """
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_reject_constant)
    except UnicodeDecodeError as error:
        raise BadRequestError(f"the body is not UTF-8 (byte {error.start}): send JSON in UTF-8") from None
    except RecursionError:
        raise BadRequestError("the body is nested too deeply to be a request") from None
    except ValueError as error:
        raise BadRequestError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequestError(f"the body is a JSON {type(body).__name__}, expected an object with 'model' and so on")
    if endpoint != GENERATE:
        return Ask(endpoint=endpoint, path=endpoint, raw=raw, body=body)
    chat = _chat_of(body)
    return Ask(endpoint=endpoint, path=CHAT, raw=json.dumps(chat).encode(), body=chat)


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


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
    for reason, names in _BEYOND_LITE:
        if any(ask.body.get(name) for name in names):
            return reason
    text = _single_turn(ask.body.get("messages")) if ask.path == CHAT else ask.body.get("prompt")
    if not isinstance(text, str):
        return "history" if ask.path == CHAT else "prompt-list"
    return "long-prompt" if len(text) > max_chars else None


def _single_turn(messages: Any) -> str | None:  # Any: whatever the client sent
    """Return the text of [user] or [system, user], or None for anything longer or richer."""
    if not isinstance(messages, list) or not 1 <= len(messages) <= 2:
        return None
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    texts = [message.get("content") if isinstance(message, dict) else None for message in messages]
    if roles not in (["user"], ["system", "user"], ["developer", "user"]):
        return None
    known = [text for text in texts if isinstance(text, str)]
    return "".join(known) if len(known) == len(texts) else None


def plan_routes(ask: Ask, settings: Settings) -> Sequence[Choice]:
    """Return the routes to try, best first; the last one always answers."""
    against = why_not_short(ask, settings.lite_max_chars)
    if against is None and settings.lite_canned and not settings.lite_model:
        return [Choice(route="maintenance", reason="short-prompt")]
    choices = []
    if against is None and settings.lite_model:
        choices.append(Choice(route="lite", reason="short-prompt"))
        choices.append(Choice(route="vllm", reason="lite-down"))
    else:
        choices.append(Choice(route="vllm", reason=against or "no-lite-model"))
        if settings.fallback and settings.lite_model:
            choices.append(Choice(route="lite", reason="vllm-down"))
    choices.append(Choice(route="maintenance" if settings.fallback else "none", reason="vllm-down"))
    return choices
