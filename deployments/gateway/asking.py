"""What goes to a model server: the client's body, as it is where that is possible, and few of its headers.

Ring: edge (may ask the lite server for its models).
"""

from deployments.gateway import replies
from deployments.gateway.intake import Head
from deployments.gateway.routing import Ask, with_usage
from deployments.gateway.settings import Settings
from deployments.gateway.upstream import Upstream


async def ask_for_lite(upstream: Upstream, ask: Ask, settings: Settings) -> Ask:
    """Return the request with the name that the lite server's model has there.

    Raises ConnectFailedError when the lite server's models have to be asked for and it is away.
    """
    name = settings.lite_model_name or await upstream.pick_model()
    if not name:
        return ask
    body = ask.body | {"model": name}
    return Ask(ask.endpoint, ask.path, replies.encode(body), body)


def body_for(ask: Ask, settings: Settings) -> tuple[bytes, bool]:
    """Return the body, and whether it asks for token counts that the client did not ask for."""
    wish = with_usage(ask) if settings.stream_usage else None
    return (ask.raw, False) if wish is None else (wish, True)


def lines_for(upstream: Upstream, head: Head, request_id: str, *, with_keys: bool) -> bytes:
    """Return the header lines. The client's own key goes to vLLM only, and never when it is one of the gateway's."""
    lines = b"x-request-id: %b\r\n%b" % (request_id.encode(), head.passed_on)
    if with_keys or upstream.has_key or upstream.is_lite or not head.authorization:
        return lines
    return lines + b"authorization: %b\r\n" % head.authorization
