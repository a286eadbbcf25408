"""Which model servers get which share of the requests, from a file that is written anew while the gateway runs.

    GATEWAY_UPSTREAMS_FILE -> read_traffic() -> Fleet.apply()

The file is written by `tatara services` and by the flow `promote` (tasks/serve/traffic.py):

    {"generation": 7, "until": 1764000000.0, "servers": [
       {"name": "vllm", "url": "http://127.0.0.1:8000", "weight": 0.9, "model_digest": "...", ...}, ...]}

The first server is the one that is trusted. The others count until `until` only: whoever tries a new model
moves that time on, and when he was killed the old model gets all requests again, by itself.

Ring: edge (disk, clock).
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.gateway.settings import base_url
from tasks import files
from tasks.errors import CorruptError

logger = logging.getLogger(__name__)
_IDS = ("model_digest", "adapter_digest", "run_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One server: where it is, its share, and what its answers lead back to."""

    name: str
    url: str
    weight: float
    ids: tuple[str, str, str]  # digest of the model, of its adapter, id of the run that serves it

    @property
    def identity(self) -> tuple[str, str, tuple[str, str, str]]:
        """All but the weight: while it is the same, so is the server."""
        return self.name, self.url, self.ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """One state of the file; `until` in seconds since 1970, 0 for always."""

    generation: int
    until: float
    targets: tuple[Target, ...]

    def now(self, time_s: float) -> tuple[Target, ...]:
        """Return the servers that count at a moment, those without a share left out."""
        trusted = self.targets[:1]
        return tuple(t for t in self.targets if t.weight > 0) or trusted if not self._is_over(time_s) else trusted

    def _is_over(self, time_s: float) -> bool:
        return 0 < self.until < time_s


class TrafficFile:
    """Reads the file when it changed; a damaged or missing one changes nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.traffic: Traffic | None = None
        self._read_at = 0.0, 0.0  # by both clocks
        self._seen: tuple[int, int] | None = None

    def read(self) -> Traffic | None:
        """Return what the file says, or what it said last."""
        try:
            stat = self.path.stat()
            seen = (stat.st_ino, stat.st_mtime_ns)  # it is renamed into place: another inode each time
            if seen != self._seen:
                self._seen = seen
                self.traffic = read_traffic(files.read_json(self.path))
                self._read_at = time.time(), time.monotonic()
        except FileNotFoundError:
            return self.traffic
        except (OSError, CorruptError) as error:
            logger.error("%s is not followed: %s", self.path, error)
        return self.traffic

    def targets(self) -> tuple[Target, ...]:
        """Return the servers that count now; none before there was a file.

        A wall clock that is set back must not prolong what nobody watches over: it counts when the file is read.
        """
        traffic = self.read()
        wall, steady = self._read_at
        return traffic.now(wall + time.monotonic() - steady) if traffic else ()


def read_traffic(content: Any) -> Traffic:  # Any: JSON, which is what is checked here
    """Return the file's content. Raises CorruptError naming what is wrong with it.

    >>> read_traffic({"generation": 1, "servers": [{"name": "vllm", "url": "http://a:1", "weight": 1}]}).targets[0].url
    'http://a:1'
    """
    try:
        targets = tuple(_target(server) for server in content["servers"])
        if not targets or len({target.name for target in targets}) < len(targets):
            raise ValueError("it names no server, or one twice")
        return Traffic(generation=int(content["generation"]), until=float(content.get("until") or 0.0), targets=targets)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(f"the list of model servers is damaged ({type(error).__name__}: {error})") from error


def _target(server: Mapping[str, Any]) -> Target:  # Any: as above
    weight = float(server["weight"])
    if not 0 <= weight <= 1e6:
        raise ValueError(f"weight {weight} of {server['name']}, expected 0 to 1000000")
    ids = [str(server.get(name) or "") for name in _IDS]
    if not all(text.isascii() and text.isprintable() and len(text) <= 200 for text in ids):
        raise ValueError(f"an id of {server['name']} is no header: expected at most 200 printable ASCII characters")
    return Target(
        name=str(server["name"]), url=base_url(str(server["url"])), weight=weight, ids=(ids[0], ids[1], ids[2])
    )
