"""Take a request in: its headers, its body, whose it is, and whether it may be asked now.

    scope, receive -> read_head(), read_body() -> authenticate(), check_budget() -> or RefusedError

Ring: edge (network, clock).  Units: bytes.
"""

import time
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive

from deployments.gateway.budgets import Budgets
from deployments.gateway.keys import Key, KeyRing
from deployments.gateway.replies import RefusedError

_PASSED_ON = frozenset({b"traceparent", b"tracestate", b"accept-language"})


class HungUpError(Exception):
    """The client went away while it sent its body."""


@dataclass(slots=True)
class Head:
    """What of a request's headers matters; `passed_on` are whole lines for the model server."""

    declared_bytes: int = 0
    authorization: bytes = b""
    passed_on: bytes = b""


def read_head(headers: list[tuple[bytes, bytes]]) -> Head:
    """Look at each header once."""
    head = Head()
    for name, value in headers:
        if name == b"authorization":
            head.authorization = value
        elif name == b"content-length":
            head.declared_bytes = int(value) if value.isdigit() else 0
        elif name in _PASSED_ON:
            head.passed_on += b"%b: %b\r\n" % (name, value)
    return head


async def read_body(receive: Receive, declared_bytes: int, limit_bytes: int) -> bytes:
    """Read the body whole. Raises RefusedError when it is too large, HungUpError."""
    check_size(declared_bytes, limit_bytes)
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HungUpError
        piece = message.get("body", b"")
        size += len(piece)
        check_size(size, limit_bytes)
        if not message.get("more_body", False):
            return b"".join((*pieces, piece)) if pieces else piece
        pieces.append(piece)


def check_size(size: int, limit_bytes: int) -> None:
    """Raise RefusedError for a body that is too large."""
    if size > limit_bytes:
        message = f"the body exceeds {limit_bytes} bytes: shorten it, or raise GATEWAY_MAX_BODY_BYTES"
        raise RefusedError(413, message, "body_too_large")


def refuse_body(message: str, headers: list[tuple[bytes, bytes]]) -> RefusedError:
    """Return the refusal of a body that can't be read: a compressed one is no JSON because of that."""
    coding = b", ".join(value for name, value in headers if name == b"content-encoding").decode("latin-1")
    if coding.lower() in ("", "identity"):
        return RefusedError(400, message, "invalid_body")
    message = f"the body is encoded ({coding}): send it as plain JSON"
    return RefusedError(415, message, "unsupported_encoding", [(b"accept-encoding", b"identity")])


def authenticate(keys: KeyRing | None, authorization: bytes) -> Key | None:
    """Return whose request it is; None where no keys are asked for. Raises RefusedError."""
    if keys is None:
        return None
    scheme, _, token = authorization.partition(b" ")
    if scheme.lower() != b"bearer" or not token.strip():
        headers = [(b"www-authenticate", b"Bearer")]
        raise RefusedError(401, "no API key: send it as `Authorization: Bearer KEY`", "missing_api_key", headers)
    key = keys.find(token.strip())
    if key is None:
        headers = [(b"www-authenticate", b"Bearer")]
        raise RefusedError(401, "this API key is not known here", "invalid_api_key", headers)
    if key.disabled:
        raise RefusedError(403, "this API key is disabled: ask whoever runs this gateway", "key_disabled")
    return key


def check_budget(key: Key, budgets: Budgets, model: Any) -> None:  # Any: whatever the client sent
    """Take one request from the key's budget. Raises RefusedError when it may not ask this, or not now."""
    if key.models and model not in key.models:
        raise RefusedError(403, f"this key may not use the model {model!r}", "model_not_allowed")
    refused = budgets.take(key.name, key.requests_per_minute, key.tokens_per_day, time.time())
    if refused is not None:
        budget, wait_s = refused
        used = f"{getattr(key, budget)} {budget.replace('_', ' ')}"
        message = f"this key's budget of {used} is used up: come back in {wait_s} s"
        raise RefusedError(429, message, budget, [(b"retry-after", b"%d" % wait_s)])
