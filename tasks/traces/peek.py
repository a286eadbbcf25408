"""Look into the queue without consuming it: for `tatara traces` and for exports.

    stream (what is in Redis), then spool (what is not there yet) -> records, each once

A record that is shipped or acknowledged while one looks may be seen or not, but never twice.

Ring: edge (disk, network).
"""

from collections.abc import Iterator
from pathlib import Path

import redis

from tasks.traces.dead_letters import DeadLetters, FileDeadLetters, RedisDeadLetters
from tasks.traces.queue import FileQueue, QueuedTrace
from tasks.traces.redis_stream import STREAM, RedisQueue

_PAGE = 500


def peek(path: Path, client: redis.Redis | None) -> Iterator[QueuedTrace]:
    """Yield what waits, oldest first. Raises TransientError when Redis is away."""
    if client is None:
        yield from _peek_file(path)
        return
    stream = RedisQueue(client)
    last = "-"
    for item in stream.peek():
        last = f"({item.id}"
        yield item
    seen: set[str] = set()
    for item in _peek_file(path):
        if item.record:
            seen.add(item.record.trace_id)
        yield item
    for item in stream.peek(last):  # shipped while we looked at the spool
        if not item.record or item.record.trace_id not in seen:
            yield item


def _peek_file(path: Path) -> Iterator[QueuedTrace]:
    queue = FileQueue(path)
    if queue.look():
        while items := queue.read(_PAGE):
            yield from items


def watch(path: Path, client: redis.Redis | None) -> Iterator[QueuedTrace | None]:
    """Yield what comes in from now on; None when there is nothing new at the moment."""
    if client is not None:
        yield from _watch_stream(client)
        return
    queue = FileQueue(path)
    while not queue.look():
        yield None
    while queue.read(_PAGE):
        pass
    while True:
        items = queue.read(_PAGE)
        yield from items or [None]


def _watch_stream(client: redis.Redis) -> Iterator[QueuedTrace | None]:
    stream = RedisQueue(client)
    after = stream.last_id()
    while True:
        found = False
        for item in stream.peek(f"({after}"):
            after, found = item.id, True
            yield item
        if not found:
            yield None


def dead_letters(path: Path, client: redis.Redis | None) -> list[DeadLetters]:
    """Return the stores of dead letters: Redis's when there is one, and the file's."""
    stores: list[DeadLetters] = [FileDeadLetters(path)]
    return [RedisDeadLetters(client, STREAM), *stores] if client else stores
