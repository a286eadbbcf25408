"""Which vLLM gets which share of the requests: the file that the gateway follows while it runs.

    write_traffic() -> <services>/upstreams.json -> the gateway's /health says which generation it follows

The first server of the file is the one that serves; its name is the slot that it runs in. So this file alone
says what is served, and a promotion that is killed at any moment leaves it saying the old model or the new one.

Ring: edge (disk, loopback).  Units: seconds.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import files
from tasks.errors import CorruptError, ServiceError
from tasks.serve.asking import get_json
from tasks.serve.command import reach
from tasks.serve.settings import SLOTS, ServiceSettings

_IDS = {"model_digest": "TATARA_MODEL_DIGEST", "adapter_digest": "TATARA_ADAPTER_DIGEST", "run_id": "TATARA_RUN_ID"}
FOLLOWED_WITHIN_S = 15.0  # the gateway looks once a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One vLLM and its part of the requests."""

    slot: str
    url: str
    weight: float
    ids: Mapping[str, str]


def share_of(settings: ServiceSettings, weight: float = 1.0) -> Share:
    """Return the vLLM in the settings' slot with its ids."""
    url = f"http://{reach(settings.spec.host)}:{settings.vllm_port}"
    return Share(slot=settings.slot, url=url, weight=weight, ids=dict(settings.ids))


def read_shares(folder: Path) -> list[Share]:
    """Return what the file says, the one that serves first; empty without a whole file."""
    try:
        servers: list[dict[str, Any]] = files.read_json(folder / "upstreams.json")["servers"]  # Any: JSON values
        return [
            Share(
                slot=server["name"],
                url=server["url"],
                weight=server["weight"],
                ids={variable: server[name] for name, variable in _IDS.items() if server.get(name)},
            )
            for server in servers
        ]
    except (OSError, CorruptError, KeyError, TypeError):
        return []


def active_slot(folder: Path) -> str:
    """Return the slot whose vLLM serves."""
    shares = read_shares(folder)
    return shares[0].slot if shares and shares[0].slot in SLOTS else SLOTS[0]


def write_traffic(settings: ServiceSettings, shares: Sequence[Share], until: float = 0.0) -> int:
    """Write who gets what; return the generation. All but the first count until `until` (seconds since 1970)."""
    generation = time.time_ns()  # never the same again, also after the file was removed
    servers = [
        {"name": share.slot, "url": share.url, "weight": share.weight}
        | {name: share.ids.get(variable, "") for name, variable in _IDS.items()}
        for share in shares
    ]
    content = {"generation": generation, "until": until, "servers": servers}
    files.write_json(settings.upstreams_file, content)
    return generation


def gateway_says(settings: ServiceSettings) -> dict[str, Any]:  # Any: JSON values
    """Return the gateway's /health, empty when it does not answer."""
    url = f"http://{reach(settings.spec.host)}:{settings.spec.gateway_port}/health"
    code, body = get_json(url)
    return body if code == 200 else {}


def wait_until_followed(settings: ServiceSettings, generation: int) -> None:
    """Return when the gateway sends its requests as this generation says. Raises ServiceError."""
    deadline = time.monotonic() + FOLLOWED_WITHIN_S
    while gateway_says(settings).get("generation") != generation:
        if time.monotonic() > deadline:
            raise ServiceError(
                f"the gateway does not follow {settings.upstreams_file} within {FOLLOWED_WITHIN_S:g} s; its log is "
                f"{settings.log('gateway')}"
            )
        time.sleep(0.1)
