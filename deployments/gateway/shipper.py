"""Ship the trace file to Redis while Redis is there; without it the file grows and nothing is lost.

    FILE_QUEUE_PATH -> RedisQueue.take_over() -> stream llm_traces

Ring: edge (disk, network), in a thread of its own.
"""

import asyncio
import logging
import threading

from deployments.gateway.settings import Settings
from tasks.errors import TataraError
from tasks.traces.queue import FileQueue

_PAUSE_S = 0.1
_RETRY_S = 1.0
_LAST_S = 5.0
logger = logging.getLogger(__name__)


class Shipper:
    """Moves the trace file to Redis while Redis is there. One per file: others wait for its lock."""

    def __init__(self, settings: Settings) -> None:
        import redis  # 0.2 s to import: only a gateway with REDIS_URL pays it

        from tasks.traces.redis_stream import RedisQueue

        client = redis.Redis.from_url(settings.redis_url, socket_timeout=5, socket_connect_timeout=2)
        self._queue = RedisQueue(client)
        self._spool = FileQueue(settings.queue_path)
        self._locked = self._has_asked = False
        self._one_thread = threading.Lock()  # a cancelled task leaves its thread running
        self.is_up = True
        self.num_shipped = 0

    async def run_forever(self) -> None:
        """Ship again and again until cancelled."""
        while True:
            await asyncio.sleep(await asyncio.to_thread(self._ship_all))

    async def stop(self) -> None:
        """Ship what is left, for a few seconds at most."""
        try:
            await asyncio.wait_for(asyncio.to_thread(self._ship_all), _LAST_S)
        except TimeoutError:
            logger.warning("Redis is too slow: the rest stays in the file for the drain")
        self._spool.close()

    def _ship_all(self) -> float:
        """Ship until the file is empty; return how long to wait before looking again."""
        with self._one_thread:
            return self._ship_locked()

    def _ship_locked(self) -> float:
        from tasks.traces.redis_stream import ship

        try:
            self._say_if_it_evicts()
            self._locked = self._locked or self._spool.lock()
            while self._locked and (count := ship(self._spool, self._queue)):
                self.num_shipped += count
        except (TataraError, OSError) as error:
            if self.is_up:
                logger.warning("traces stay in the file: %s", error)
            self.is_up = False
            return _RETRY_S
        if not self.is_up:
            logger.info("Redis is back: traces are shipped again")
        self.is_up = True
        return _PAUSE_S if self._locked else _RETRY_S

    def _say_if_it_evicts(self) -> None:
        if self._has_asked:
            return
        if policy := self._queue.evicts():
            logger.error(
                "Redis has maxmemory-policy %s: when it is full it drops unread traces without an error; "
                "set it to noeviction, then it refuses them and they wait in the file",
                policy,
            )
        self._has_asked = True
