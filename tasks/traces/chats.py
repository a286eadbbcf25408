"""Turn trace records into training rows, or say why not.

    TraceRecord -> chat_row() -> {"messages": [...], "trace_id": ...}, which fetch_dataset reads

Only what a model should learn from: an answered chat of texts whose answer ended by itself.

Ring: pure.
"""

from itertools import pairwise
from typing import Any

from tasks.errors import DataError
from tasks.traces.record import Json, TraceRecord

_ROLES = ("system", "developer", "user", "assistant")


class NoChatError(DataError):
    """The record makes no training row; the message is the reason."""


def chat_row(record: TraceRecord, *, with_redacted: bool = False) -> Json:
    """Return one row. Raises NoChatError with the reason.

    `with_redacted` keeps chats that hold marks like [redacted:email], which a model would learn to say.
    """
    if record.status != "ok" or record.route == "maintenance":
        raise NoChatError(f"status {record.status}" if record.status != "ok" else "a maintenance message")
    if record.redactions and not with_redacted:
        raise NoChatError("something was taken out")
    request, response = record.request or {}, record.response or {}
    messages = [_message(item) for item in _asked(request)]
    messages.append({"role": "assistant", "content": _answer(response)})
    roles = [message["role"] for message in messages if message["role"] not in ("system", "developer")]
    if roles[0] != "user" or any(first == second for first, second in pairwise(roles)):
        raise NoChatError("user and assistant do not alternate")
    return {"messages": messages, "trace_id": record.trace_id}


def _asked(request: Json) -> list[Any]:  # Any: whatever the client sent
    """Return the messages of a chat, or of OpenAI's responses."""
    messages = request.get("messages", request.get("input"))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages:
        raise NoChatError("no messages")
    instructions = request.get("instructions")
    return [{"role": "system", "content": instructions}, *messages] if instructions else messages


def _message(item: Any) -> dict[str, str]:  # Any: whatever the client sent
    if not isinstance(item, dict) or item.get("role") not in _ROLES or item.get("tool_calls"):
        raise NoChatError("a message of a tool or of no known role")
    return {"role": item["role"], "content": _text(item.get("content"))}


def _text(content: Any) -> str:  # Any: whatever the client sent
    """Return a content as one text: a string, or parts that are all texts."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise NoChatError("a content that is no text")
        content = "".join(texts)
    if not isinstance(content, str) or not content.strip():
        raise NoChatError("a content that is empty or no text")
    return content


def _answer(response: Json) -> str:
    """Return the text of the first choice, or of a response's output."""
    choices, output = response.get("choices"), response.get("output")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        choice = choices[0]
        if choice.get("finish_reason") not in ("stop", None):
            raise NoChatError(f"the answer ended by {choice['finish_reason']}")
        message = choice.get("message")
        if not isinstance(message, dict) or message.get("tool_calls"):
            raise NoChatError("the answer is no message, or calls a tool")
        return _text(message.get("content"))
    if isinstance(output, list) and response.get("status") in ("completed", None):
        said = [item for item in output if isinstance(item, dict) and item.get("type") == "message"]
        if len(said) == 1:
            return _text(said[0].get("content"))
    raise NoChatError("no whole answer")
