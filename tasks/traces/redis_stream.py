"""The same queue on a Redis Stream, for gateways and drains on several machines.

    llm_traces          the stream; an entry is removed when it is acknowledged, never trimmed
    llm_traces:dead     dead letters
    llm_traces:drain    who consumes now; expires when that process dies
    llm_traces:shipped:<queue id>   up to where a gateway's spool was taken over

A gateway writes to its local spool (a FileQueue) first and `ship` moves the spool here: while Redis
is away the spool grows, and nothing is lost or doubled when it is back, because the script that adds
the entries also remembers the position in the same step.

Ring: edge (network).  Source: Redis Streams; XADD MAXLEN would drop unread entries silently.
"""

import logging
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import redis

from tasks.errors import AccessError, CapacityError, TransientError
from tasks.traces.queue import FileQueue, QueuedTrace

STREAM = "llm_traces"
GROUP = "drain"
_FIELD = b"record"
_SHIP = """
local last = redis.call('GET', KEYS[2]) or ''
local added = 0
for i = 1, #ARGV, 2 do
  if ARGV[i] > last then
    redis.call('XADD', KEYS[1], '*', 'record', ARGV[i + 1])
    last = ARGV[i]
    added = added + 1
  end
end
redis.call('SET', KEYS[2], last)
return added
"""
_UNLOCK = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
_RENEW = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end return 0"
logger = logging.getLogger(__name__)


@contextmanager
def mapped() -> Iterator[None]:
    """Turn redis-py's errors into ours; the URL, which may hold a password, stays out of the message."""
    try:
        yield
    except redis.AuthenticationError as error:
        raise AccessError("Redis refused the user or password in REDIS_URL: correct it") from error
    except redis.ResponseError as error:
        if not isinstance(error, redis.OutOfMemoryError) and "OOM" not in str(error):  # Redis 6.2 inside a script
            raise
        raise CapacityError("Redis is full (maxmemory): drain the queue or give Redis more memory") from error
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise TransientError(f"Redis does not answer ({type(error).__name__}): is it running?") from error


class RedisQueue:
    """A `TraceQueue` on one stream with one consumer group."""

    def __init__(
        self, client: redis.Redis, stream: str = STREAM, *, lock_s: float = 60.0, claim_idle_s: float = 0.0
    ) -> None:
        self._redis = client
        self.stream = stream
        self._token = uuid.uuid4().hex
        self._lock_ms = int(lock_s * 1000)
        self._idle_ms = int(claim_idle_s * 1000)
        self._claim_from: bytes | None = b"0-0"
        self._done = threading.Event()

    def append(self, lines: Iterable[bytes]) -> None:
        """Add records in one round trip."""
        with mapped(), self._redis.pipeline(transaction=True) as pipe:
            for line in lines:
                pipe.xadd(self.stream, {_FIELD: line})
            pipe.execute()

    def take_over(self, queue_id: str, items: Sequence[QueuedTrace]) -> int:
        """Add spooled records that are not here yet; return how many. Asking twice changes nothing."""
        arguments: list[Any] = [part for item in items for part in (item.id, item.line)]  # Any: redis-py's own types
        with mapped():
            return int(self._redis.eval(_SHIP, 2, self.stream, f"{self.stream}:shipped:{queue_id}", *arguments))

    def evicts(self) -> str | None:
        """Return the policy by which Redis may drop unread entries silently, None when it keeps them or won't say."""
        with mapped():
            try:
                policy: Any = self._redis.config_get("maxmemory-policy")  # Any: redis-py types replies loosely
            except redis.ResponseError:  # a managed Redis hides its configuration
                return None
        name = policy.get("maxmemory-policy", "noeviction")
        return None if name == "noeviction" else str(name)

    def lock(self) -> bool:
        """Become the one consumer. The lock is renewed by a thread, and expires `lock_s` after this process."""
        with mapped():
            if not self._redis.set(f"{self.stream}:drain", self._token, nx=True, px=self._lock_ms):
                return False
            try:
                self._redis.xgroup_create(self.stream, GROUP, id="0", mkstream=True)
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise
        self._claim_from = b"0-0"
        self._done = threading.Event()
        threading.Thread(target=self._renew_until, args=(self._done,), name="trace-lock", daemon=True).start()
        return True

    def unlock(self) -> None:
        """Stop being the consumer."""
        self._done.set()
        with mapped():
            self._redis.eval(_UNLOCK, 1, f"{self.stream}:drain", self._token)

    def _renew_until(self, done: threading.Event) -> None:
        """Renew while a slow sink takes its time; give up when the lock is another's or has expired."""
        renewed = time.monotonic()
        while not done.wait(self._lock_ms / 3000) and time.monotonic() - renewed < self._lock_ms / 1000:
            with suppress(redis.RedisError):
                if not self._redis.eval(_RENEW, 1, f"{self.stream}:drain", self._token, self._lock_ms):
                    return
                renewed = time.monotonic()

    def _require_lock(self) -> None:
        if not self._redis.eval(_RENEW, 1, f"{self.stream}:drain", self._token, self._lock_ms):
            raise TransientError(f"the drain lost its lock on {self.stream}: another drain took over")

    def read(self, limit: int) -> list[QueuedTrace]:
        """Return first what a dead consumer left (marked redelivered), then what is new."""
        with mapped():
            self._require_lock()
            while self._claim_from is not None:
                reply: Any = self._redis.xautoclaim(  # Any: redis-py types replies loosely
                    self.stream, GROUP, "drain", self._idle_ms, start_id=self._claim_from, count=limit
                )
                self._claim_from = None if reply[0] in (b"0-0", "0-0") else reply[0]
                if stale := self._parse(reply[1], redelivered=True):
                    return stale
            fresh: Any = self._redis.xreadgroup(GROUP, "drain", {self.stream: ">"}, count=limit)  # Any: as above
        return self._parse(fresh[0][1], redelivered=False) if fresh else []

    def intend(self, items: Sequence[QueuedTrace]) -> None:
        """Redis itself noted the delivery when it handed the entries out: only make sure that they are ours."""
        with mapped():
            self._require_lock()

    def bury(self, letters: Sequence[tuple[QueuedTrace, str]]) -> None:
        """Move refused records to the dead-letter stream, in one step."""
        with mapped(), self._redis.pipeline(transaction=True) as pipe:
            for item, reason in letters:
                pipe.xadd(f"{self.stream}:dead", {"reason": reason, _FIELD: item.line})
                pipe.xack(self.stream, GROUP, item.id)
                pipe.xdel(self.stream, item.id)
            pipe.execute()

    def ack(self, items: Sequence[QueuedTrace]) -> None:
        """Acknowledge and remove, in one step: the stream's length is what still waits."""
        ids = [item.id for item in items]
        with mapped(), self._redis.pipeline(transaction=True) as pipe:
            pipe.xack(self.stream, GROUP, *ids)
            pipe.xdel(self.stream, *ids)
            pipe.execute()

    def lag(self) -> tuple[int, str | None]:
        """Return the length of the stream and the start of its oldest record."""
        with mapped():
            count = self._redis.xlen(self.stream)
            oldest = self._parse(self._redis.xrange(self.stream, count=1) or (), redelivered=False)
        record = oldest[0].record if oldest else None
        return int(count), record.started_at if record else None

    def peek(self, after: str = "-") -> Iterator[QueuedTrace]:
        """Read all entries from `after` on ("-": all, "(ID": behind that one) and consume none."""
        while True:
            with mapped():
                entries: Any = self._redis.xrange(self.stream, min=after, count=500)  # Any: as above
            if not entries:
                return
            yield from self._parse(entries, redelivered=False)
            after = f"({entries[-1][0].decode()}"

    def last_id(self) -> str:
        """Return the id of the last entry that was ever added; "0-0" when there was none."""
        with mapped():
            if not self._redis.exists(self.stream):
                return "0-0"
            info: Any = self._redis.xinfo_stream(self.stream)  # Any: as above
        return info["last-generated-id"].decode()

    def _parse(self, entries: Iterable[Any], *, redelivered: bool) -> list[QueuedTrace]:  # Any: redis-py's replies
        """Read entries; Redis 6.2 shows one that was deleted meanwhile as (None, None)."""
        return [
            QueuedTrace.parse(id.decode(), fields.get(_FIELD, b""), redelivered=redelivered)
            for id, fields in entries
            if id is not None and fields is not None
        ]


def ship(spool: FileQueue, target: RedisQueue, limit: int = 500) -> int:
    """Move the next spooled records to Redis and return how many; call with the spool's lock held.

    Raises TransientError when Redis is away; the records stay in the spool.
    """
    items = spool.read(limit)
    if not items:
        return 0
    try:
        target.take_over(spool.queue_id, items)
    except Exception:
        spool.rewind()
        raise
    spool.ack(items)
    return len(items)
