"""Speak to the gateway as any user would: JSON over HTTP, plain and streamed.

Ring: edge.  Units: seconds.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from tasks.environment import read_secret
from tasks.errors import ServiceError, TransientError

GATEWAY_KEY = "TATARA_GATEWAY_KEY"


def get_json(url: str, timeout_s: float) -> dict[str, Any]:  # Any: JSON values
    """GET a JSON document, {} for none. Raises TransientError when nobody answers, ServiceError on a status >= 400."""
    with _open(urllib.request.Request(url, headers=_login()), timeout_s) as reply:  # noqa: S310 - our own endpoint
        return json.loads(reply.read() or b"{}")


def post_json(url: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:  # Any: JSON values
    """POST JSON, return JSON."""
    with _open(_request(url, body), timeout_s) as reply:
        return json.load(reply)


def stream_events(
    url: str, body: dict[str, Any], timeout_s: float
) -> Iterator[tuple[float, dict[str, Any]]]:  # Any: JSON
    """POST a streamed chat or completion; yield (seconds since the request, event).

    Raises ServiceError when the stream breaks off before its end.
    """
    start = time.monotonic()
    with _open(_request(url, {**body, "stream": True}), timeout_s) as reply:
        for line in reply:
            data = line.decode().strip().removeprefix("data: ")
            if data == "[DONE]":
                return
            if line.startswith(b"data: "):
                yield time.monotonic() - start, json.loads(data)
    raise ServiceError(f"{url} broke its stream off: it ended without [DONE]")


def stream_choices(
    url: str, body: dict[str, Any], timeout_s: float
) -> Iterator[tuple[float, dict[str, Any]]]:  # Any: JSON
    """The same, choice by choice."""
    for seconds, event in stream_events(url, body, timeout_s):
        for choice in event.get("choices") or []:
            yield seconds, choice


def text_of(message: dict[str, Any]) -> str:  # Any: JSON values
    """Return what a message says: its content, or what a reasoning model thinks before it."""
    return message.get("content") or message.get("reasoning_content") or message.get("reasoning") or ""


def _login() -> dict[str, str]:
    """Return the header of the gateway key that this machine's flows use, when the gateway asks for one.

    Without one it is vLLM's own: a candidate is asked directly, and a gateway without keys hands it on.
    """
    key = read_secret(os.environ, GATEWAY_KEY, "VLLM_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _request(url: str, body: dict[str, Any]) -> urllib.request.Request:  # Any: JSON values
    headers = {"Content-Type": "application/json", **_login()}
    return urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)  # noqa: S310 - our own endpoint


def _open(request: urllib.request.Request, timeout_s: float) -> Any:  # Any: urllib's reply has no public type
    try:
        return urllib.request.urlopen(request, timeout=timeout_s)  # noqa: S310 - our own endpoint
    except urllib.error.HTTPError as error:
        body = error.read(2000).decode(errors="replace")
        raise ServiceError(f"{request.full_url} answered {error.code}: {body}") from error
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        raise TransientError(f"{request.full_url} does not answer ({error}): is the service running?") from error
