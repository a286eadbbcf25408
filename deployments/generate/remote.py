"""Generate at an endpoint: OpenAI's completions or chat, streamed, from vLLM or the gateway.

The key is that of TATARA_GATEWAY_KEY, else VLLM_API_KEY, as verify asks with.

Ring: edge (network).  Units: tokens, seconds.
"""

import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from deployments.generate.wish import Told, Wish
from tasks.errors import MissingError, SpecError
from tasks.verify.client import get_json, stream_events, text_of

_TIMEOUT_S = 600.0
Json = dict[str, Any]  # Any: JSON values


def say(url: str, model: str, wish: Wish, told: Told) -> Iterator[str]:
    """Yield the answer's text as it comes; `told` is filled at the end.

    Args:
        url: http://host:port, of vLLM or the gateway.
        model: one of those that are served; empty or `latest`: the first.
        wish: what to say and how; device and dtype are the server's.
        told: takes the figures.
    Raises: SpecError (no URL), MissingError (no such model there), TransientError, ServiceError (also for a prompt
        that is too long: the server says by how much).
    """
    root = _root(url)
    asked = wish.prompt if not wish.chat else [{"role": "user", "content": wish.prompt}]
    body: Json = {
        "model": _choose(root, model),
        ("messages" if wish.chat else "prompt"): asked,
        "max_tokens": wish.max_tokens,
        "temperature": wish.temperature,
        "top_p": wish.top_p,
        "stream_options": {"include_usage": True},
        **({} if wish.seed is None else {"seed": wish.seed}),
    }
    start, last, reason = time.monotonic(), 0.0, ""
    for last, event in stream_events(f"{root}/v1/{'chat/' if wish.chat else ''}completions", body, _TIMEOUT_S):
        usage = event.get("usage") or {}
        told.num_tokens = usage.get("completion_tokens", told.num_tokens)
        told.num_prompt_tokens = usage.get("prompt_tokens", told.num_prompt_tokens)
        for choice in event.get("choices") or []:
            text = text_of(choice.get("delta") or {}) if wish.chat else choice.get("text") or ""
            reason = choice.get("finish_reason") or reason
            if text:
                told.first_token_s = told.first_token_s or last
                yield text
    told.seconds = time.monotonic() - start
    told.stopped_by = {"stop": "eos"}.get(reason, reason or "nothing that was said")


def _root(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise SpecError(f"--url {url!r} is no address: expected http://host:port of vLLM or the gateway")
    return url.rstrip("/").removesuffix("/v1")


def _choose(root: str, model: str) -> str:
    names = [each["id"] for each in get_json(f"{root}/v1/models", 30.0).get("data", [])]
    if model in ("", "latest") and names:
        return names[0]
    if model not in names:
        raise MissingError(f"{root} serves {', '.join(names) or 'no model'}, not {model!r}: name one, or leave it out")
    return model
