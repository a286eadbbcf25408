"""`tatara traces`: look into the trace queue, export it, settle dead letters.

    tatara traces tail [--follow] [-n N]          the last traces that wait, one line each
    tatara traces stats [--json]                  how many wait, since when, and what they are
    tatara traces export OUT.jsonl [--chats]      records, or rows that fetch_dataset reads; consumes nothing
    tatara traces dead list | show ID | replay [ID ...] | discard ID ...
    python -m deployments.traces follow           drain all the time (the gateway's direct path)

The queue is the one of FILE_QUEUE_PATH and REDIS_URL.

Ring: edge.
"""

import argparse
import json
import logging
import os
import select
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

from tasks import files
from tasks.errors import MissingError, SpecError
from tasks.traces.chats import NoChatError, chat_row
from tasks.traces.dead_letters import Letter, is_replayable
from tasks.traces.peek import dead_letters, peek, watch
from tasks.traces.queue import QueuedTrace
from tasks.traces.record import TraceRecord
from tasks.traces.run import connect_redis, queue_path

_POLL_S = 0.5
_SHOWN_CHARS = 48


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add what `tatara traces` understands to its parser."""
    actions = parser.add_subparsers(dest="action", required=True)
    tail = actions.add_parser("tail", help="the last traces that wait")
    tail.add_argument("-n", type=int, default=10, metavar="N", help="how many (10)")
    tail.add_argument("-f", "--follow", action="store_true", help="go on with what comes in, until Ctrl-C")
    stats = actions.add_parser("stats", help="how many wait, since when, and what they are")
    stats.add_argument("--json", action="store_true", help="as JSON")
    export = actions.add_parser("export", help="write what waits to a JSONL file, consuming nothing")
    export.add_argument("out", type=Path, metavar="OUT.jsonl")
    export.add_argument("--chats", action="store_true", help="rows with `messages`, for fetch_dataset")
    export.add_argument("--dead", action="store_true", help="dead letters too")
    export.add_argument("--with-redacted", action="store_true", help="chats in which something was taken out, too")
    dead = actions.add_parser("dead", help="records that were refused")
    verbs = dead.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="id and reason of each")
    verbs.add_parser("show", help="one of them whole").add_argument("id")
    verbs.add_parser("replay", help="put them back into the queue").add_argument("ids", nargs="*", metavar="ID")
    verbs.add_parser("discard", help="remove them for good").add_argument("ids", nargs="+", metavar="ID")


def run(options: argparse.Namespace) -> int:
    """Run one action; return the exit status."""
    path, client = queue_path(os.environ), connect_redis(os.environ)
    if options.action == "tail":
        return _tail(path, client, options.n, follow=options.follow)
    if options.action == "stats":
        return _stats(path, client, as_json=options.json)
    if options.action == "export":
        return _export(path, client, options)
    return _dead(path, client, options)


def _tail(path: Path, client: redis.Redis | None, count: int, *, follow: bool) -> int:
    coming = watch(path, client) if follow else iter(())
    first = next(coming, None)  # from here on nothing is missed
    last: list[QueuedTrace] = []
    for item in peek(path, client):
        last = [*last, item][-count:] if count > 0 else []
    for item in last:
        print(_line(item))
    shown = {item.id for item in last}
    for item in _chained(first, coming):
        if item is None:
            time.sleep(_POLL_S)
        elif item.id not in shown:
            print(_line(item), flush=True)
    return 0


def _chained(first: QueuedTrace | None, rest: Iterator[QueuedTrace | None]) -> Iterator[QueuedTrace | None]:
    if first is not None:
        yield first
    yield from rest


def _line(item: QueuedTrace) -> str:
    """Write one trace as one line: when, what, who, how long, how much, and how it begins."""
    record = item.record
    if record is None:
        return f"?  {item.problem}"
    tokens = (record.usage or {}).get("total_tokens", "-")
    parts = (
        *(record.started_at[:19] + "Z", record.status, record.http_status, record.route, record.model or "-"),
        *(f"{record.duration_ms:.0f} ms", f"{tokens} tokens", record.key_name or "-", record.trace_id),
    )
    return "  ".join(map(str, parts)) + f"  {_beginning(record)}"


def _beginning(record: TraceRecord) -> str:
    """Return how the last message begins; control characters must not reach a terminal."""
    request = record.request or {}
    messages = request.get("messages")
    said: Any = request.get("prompt", "")  # Any: whatever the client sent
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        said = messages[-1].get("content")
    text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    shown = "".join(letter if letter.isprintable() else " " for letter in text[: 2 * _SHOWN_CHARS])
    return shown[:_SHOWN_CHARS] + ("…" if len(shown) > _SHOWN_CHARS else "")


def _stats(path: Path, client: redis.Redis | None, *, as_json: bool) -> int:
    from datetime import UTC, datetime

    from tasks.traces.spec import lag_seconds

    names = ("status", "route", "model", "key_name")
    counted: dict[str, Counter[str]] = {name: Counter() for name in names}
    redactions: Counter[str] = Counter()
    waiting = size = unreadable = tokens = 0
    requests, oldest = 0.0, None
    for item in peek(path, client):
        waiting, size, record = waiting + 1, size + len(item.line), item.record
        if record is None:
            unreadable += 1
            continue
        oldest = min(oldest or record.started_at, record.started_at)
        requests += 1 / record.sample_rate
        for name in names:
            counted[name][str(getattr(record, name))] += 1
        redactions.update(record.redactions or {})
        total = (record.usage or {}).get("total_tokens")
        tokens += total if isinstance(total, int) else 0
    found = {
        "waiting": waiting,
        "bytes": size,
        "unreadable": unreadable,
        "oldest": oldest,
        "lag_s": round(lag_seconds(oldest, datetime.now(UTC)), 1),
        "requests_before_sampling": round(requests),
        "total_tokens": tokens,
        **{name: dict(counter.most_common(20)) for name, counter in counted.items()},
        "redactions": dict(redactions),
        "dead_letters": sum(len(store.letters()) for store in dead_letters(path, client)),
    }
    print(json.dumps(found, indent=2) if as_json else _as_table(found))
    return 0


def _as_table(found: dict[str, Any]) -> str:  # Any: numbers, texts and counts by name
    rows = []
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {count}" for key, count in value.items())
        rows.append(f"{name.replace('_', ' '):<26}{'-' if value in (None, '') else value}")
    return "\n".join(rows)


def _export(path: Path, client: redis.Redis | None, options: argparse.Namespace) -> int:
    items = peek(path, client)
    reasons: Counter[str] = Counter()
    count = 0
    with files.aside(options.out) as aside, aside.open("wb") as out:
        for line in _lines(items, dead_letters(path, client) if options.dead else []):
            item = QueuedTrace.parse("", line, redelivered=False)
            try:
                out.write(_exported(item, options))
                count += 1
            except NoChatError as reason:
                reasons[str(reason)] += 1
    left_out = "".join(f"\n  {number} left out: {reason}" for reason, number in reasons.most_common())
    print(f"{count} {'chats' if options.chats else 'records'} in {options.out}{left_out}")
    return 0


def _lines(items: Iterator[QueuedTrace], stores: list[Any]) -> Iterator[bytes]:  # Any: DeadLetters
    for item in items:
        yield item.line
    for store in stores:
        for letter in store.letters():
            yield letter.line


def _exported(item: QueuedTrace, options: argparse.Namespace) -> bytes:
    if item.record is None:
        raise NoChatError("a line that is no record")
    if not options.chats:
        return item.record.to_line()
    row = chat_row(item.record, with_redacted=options.with_redacted)
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _dead(path: Path, client: redis.Redis | None, options: argparse.Namespace) -> int:
    stores = dead_letters(path, client)
    letters = [letter for store in stores for letter in store.letters()]
    if options.verb == "list":
        print("\n".join(f"{letter.id}  {letter.reason[:160]}" for letter in letters) or "no dead letters")
        return 0
    if options.verb == "show":
        for letter in _named(letters, [options.id]):
            print(f"{letter.reason}\n{letter.line.decode(errors='replace').rstrip()}")
        return 0
    every = {letter.id for letter in letters if is_replayable(letter)}
    ids = {letter.id for letter in _named(letters, options.ids)} if options.ids else every
    if options.verb == "replay" and (torn := sorted(ids - every)):
        raise SpecError(f"{torn[0]} is no JSON object, it would only be refused again: show it, then discard it")
    count = sum(store.replay(ids) if options.verb == "replay" else store.discard(ids) for store in stores)
    print(f"{count} dead letters {'are in the queue again' if options.verb == 'replay' else 'discarded'}")
    return 0


def _named(letters: list[Letter], ids: list[str]) -> list[Letter]:
    if missing := sorted(set(ids) - {letter.id for letter in letters}):
        raise MissingError(f"there is no dead letter {missing[0]}: `tatara traces dead list` shows them")
    return [letter for letter in letters if letter.id in ids]


def follow_until_parent_ends() -> int:
    """Drain all the time until standard input closes, which it does when the gateway ends."""
    from tasks.traces.follow import follow
    from tasks.traces.run import queue_from_environment, sink_from_environment
    from tasks.traces.spec import DrainSpec

    spec = DrainSpec()

    def wait(seconds: float) -> bool:
        return bool(select.select([sys.stdin], [], [], seconds)[0])

    follow(queue_from_environment, sink_from_environment(spec), spec, wait)
    return 0


if __name__ == "__main__":
    if sys.argv[1:] != ["follow"]:
        sys.exit("usage: python -m deployments.traces follow (for the rest: tatara traces)")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    sys.exit(follow_until_parent_ends())
