"""What all requests share: the servers, the places, the keys, the counts, and the clock over them.

    create_app() -> Gateway -> one Exchange per request to a hot route
                            -> time limits, changed keys, idle connections

The hot routes are taken before FastAPI: its routing, validation and middleware cost more than the whole of
this. FastAPI keeps the other routes and describes these ones in /openapi.json.

Ring: edge.  Units: seconds of the loop's clock.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.gateway.admission import Gate
from deployments.gateway.budgets import Budgets
from deployments.gateway.keys import Key, KeyRing
from deployments.gateway.metrics import Metrics
from deployments.gateway.recorder import Recorder
from deployments.gateway.routing import Choice, plan_for
from deployments.gateway.settings import Settings
from deployments.gateway.traffic import TrafficFile
from deployments.gateway.upstream import Fleet, Upstream
from tasks import files
from tasks.errors import TataraError

if TYPE_CHECKING:
    from deployments.gateway.exchange import Exchange
    from deployments.gateway.lite_processes import LiteProcesses

_LAST_TRACES_S = 2.0
_SLOW_TICK_S = 1.0
_MOST_TOKENS = 1 << 53
logger = logging.getLogger(__name__)


class Gateway:
    """Owns everything that lives as long as the gateway."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keys = KeyRing(settings.keys_file) if settings.keys_file else None
        self.recorder = Recorder(settings)
        self.recorder.open()
        self.budgets = Budgets()
        self.metrics = Metrics()
        self.gate = Gate(settings.max_concurrent, settings.max_waiting, settings.wait_s)
        self.running: set[Exchange] = set()
        self.is_draining = False
        self.lite = _own_lite(settings) if settings.runs_lite else None
        self.fleet = Fleet(settings, self.lite.upstreams if self.lite else ())
        self._generation = 0
        self.traffic = TrafficFile(settings.upstreams_file) if settings.upstreams_file else None
        self._watchers: dict[Upstream, asyncio.Task[None]] = {}
        self.follow_traffic()
        self._plans: dict[tuple[str, str | None], Sequence[Choice]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._usage_file = Path(f"{settings.keys_file}.usage") if settings.keys_file else None
        self._restore_budgets()

    def plan(self, path: str, against: str | None) -> Sequence[Choice]:
        """Return the routes to try; the same question has the same answer."""
        plan = self._plans.get((path, against))
        if plan is None:
            plan = self._plans[path, against] = plan_for(path, against, self.settings)
        return plan

    def charge(self, key: Key | None, usage: Any) -> None:  # Any: what a model server says of its tokens
        """Count the tokens of an answer, for all and for its key."""
        if not isinstance(usage, dict):
            return
        prompt = _num_tokens(usage.get("prompt_tokens", usage.get("input_tokens")))
        completion = _num_tokens(usage.get("completion_tokens", usage.get("output_tokens")))
        self.metrics.note_tokens(prompt, completion)
        if key is not None:
            self.budgets.charge(key.name, prompt + completion, time.time())

    async def start(self) -> None:
        """Start what runs beside the requests."""
        self.recorder.start()
        self._tasks = [asyncio.create_task(self._watch_forever())]
        self._watch_servers()
        if self.lite:
            self._tasks += self.lite.start()

    async def stop(self) -> None:
        """Wait for the last traces, then let go of everything."""
        until = time.monotonic() + _LAST_TRACES_S
        while self.running and time.monotonic() < until:  # their tasks were cancelled; each writes its trace
            await asyncio.sleep(0.01)
        tasks = [*self._tasks, *self._watchers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.fleet.close()
        if self.lite:
            await self.lite.stop()
        self._save_budgets()
        await self.recorder.stop()

    async def _watch_forever(self) -> None:
        """Look at the time limits of all requests at once: a timer for each would cost more."""
        loop = asyncio.get_running_loop()
        limits = (self.settings.read_timeout_s, self.settings.body_timeout_s, self.settings.total_timeout_s)
        pause_s, slow_at = min(0.25, *(limit / 4 for limit in limits)), 0.0
        while True:
            await asyncio.sleep(pause_s)
            now = loop.time()
            for exchange in list(self.running):
                exchange.check_time(now)
            if now >= slow_at:
                slow_at = now + _SLOW_TICK_S
                for upstream in self.fleet.all:
                    upstream.pool.drop_idle(now)
                await asyncio.to_thread(self._look_at_files)
                self.follow_traffic()
                self._watch_servers()

    def follow_traffic(self) -> None:
        """Give the servers the shares that the file says; without a file VLLM_URL counts."""
        targets = self.traffic.targets() if self.traffic else ()
        if targets:
            self._generation = self.traffic.traffic.generation if self.traffic and self.traffic.traffic else 0
            self.fleet.apply(targets)

    def shares(self) -> dict[str, Any]:  # Any: JSON values
        """Return what /health says of the servers and their shares; nothing without a file."""
        if self.traffic is None:
            return {}
        servers = [(each, each.weight) for each in self.fleet.routes["vllm"]]
        gone = [(each, 0.0) for each in self.fleet.leaving]
        upstreams = [
            {
                "name": each.name,
                "url": each.base,
                "weight": weight,
                "in_flight": each.num_running,
                "answered": each.counts.answered,
                "failed": each.counts.failed,
                "seconds": round(each.counts.seconds, 6),
                "model_digest": each.ids[0],
            }
            for each, weight in (*servers, *gone)
        ]
        return {"generation": self._generation, "upstreams": upstreams}

    def _watch_servers(self) -> None:
        """Probe each server of ours while it is one."""
        servers = self.fleet.all
        for each in self._watchers.keys() - set(servers):
            self._watchers.pop(each).cancel()
        for each in servers:
            if each not in self._watchers:
                self._watchers[each] = asyncio.create_task(each.watch())

    def _look_at_files(self) -> None:
        if self.keys is not None:
            self.keys.reload()
            self._save_budgets()

    def _restore_budgets(self) -> None:
        if self._usage_file is not None and self._usage_file.exists():
            try:
                self.budgets.restore(files.read_json(self._usage_file))
            except (TataraError, OSError, AttributeError) as error:
                logger.warning("today's tokens are counted from 0: %s", error)

    def _save_budgets(self) -> None:
        if self._usage_file is None or not self.budgets.has_changed:
            return
        self.budgets.has_changed = False
        try:
            files.write_json(self._usage_file, self.budgets.to_json())
        except OSError as error:
            logger.warning("can't keep today's token counts in %s: %s", self._usage_file, error)


def _num_tokens(said: Any) -> int:  # Any: JSON
    """Return the count; 0 for what is none. Python would not write a sum of thousands of digits.

    >>> _num_tokens(7), _num_tokens(None), _num_tokens(-1), _num_tokens(10**4299)
    (7, 0, 0, 0)
    """
    return said if isinstance(said, int) and 0 < said < _MOST_TOKENS else 0


def _own_lite(settings: Settings) -> "LiteProcesses":
    from deployments.gateway.lite_processes import LiteProcesses  # only who has one pays for it

    return LiteProcesses(settings)
