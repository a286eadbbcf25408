"""The contract of a chat: rendered as in training, parsed into reasoning and answer, ended for a true reason.

    messages --template--> prompt ids --model--> tokens --parser--> reasoning, content, finish_reason

What is checked needs no clever answer: the ids that vLLM put before the model, that no marker of the format
is left in the text, and that the end is the one that the count of tokens says.

Ring: pure.
"""

import re
from collections.abc import Sequence
from typing import Any

from tasks.errors import AttestationError

MARKERS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
TEXT = "鋼 from the たたら furnace, 1,234 kg: naïve façade — 火 & 風。"  # tells tokenizers apart
_DATE = re.compile(r"\d{4}-\d\d-\d\d")  # the system message holds today's
_REASONS = ("stop", "length", "tool_calls")
Json = dict[str, Any]  # Any: JSON values


def check_text_ids(ids: object, expected: list[int]) -> None:
    """Raise AttestationError unless the server reads a text with the tokenizer that the model was trained with."""
    check_ids(ids, expected, TEXT)


def check_ids(ids: object, expected: list[int], text: str) -> None:
    """Raise AttestationError unless `text` is these tokens to the server."""
    if ids != expected:
        raise AttestationError(
            f"the server reads {text!r} as the tokens {_shown(ids)}, the model's own tokenizer as "
            f"{_shown(expected)}: a stale tokenizer is served. Redeploy the published folder"
        )


def check_prompt(prompt: str, expected: str) -> None:
    """Raise AttestationError unless a chat is put before the model as in training; the date may be another one."""
    if _DATE.sub("(date)", prompt) != _DATE.sub("(date)", expected):
        raise AttestationError(
            f"the server puts {prompt!r} before the model, its chat template says {expected!r}: the model was trained "
            "on the latter. Redeploy the merged folder, or look at --chat-template in extra_args"
        )


def check_message(message: Json, specials: Sequence[str]) -> None:
    """Raise AttestationError when a marker of the format is left in what a person reads."""
    for name in ("content", "reasoning_content", "reasoning"):
        said = message.get(name) or ""
        left = [marker for marker in {*MARKERS, *specials} if marker in said]
        if left:
            raise AttestationError(
                f"the answer's {name} holds {', '.join(sorted(left))} ({said[:200]!r}): the server does not parse this "
                "model's format, or training taught another one"
            )


def check_end(finish_reason: object, num_tokens: int, max_tokens: int) -> None:
    """Raise AttestationError when the end is not the one that the count of tokens says."""
    if finish_reason not in _REASONS:
        raise AttestationError(f"an answer ended with finish_reason {finish_reason!r}, expected {', '.join(_REASONS)}")
    if finish_reason == "length" and num_tokens < max_tokens:
        raise AttestationError(f"an answer of {num_tokens} tokens says that it was cut at {max_tokens}")
    if finish_reason == "stop" and num_tokens > max_tokens:
        raise AttestationError(f"an answer of {num_tokens} tokens went past the {max_tokens} that were asked for")


def _shown(ids: object) -> str:
    text = str(ids)
    return text if len(text) <= 200 else f"{text[:197]}..."
