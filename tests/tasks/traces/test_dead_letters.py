"""Dead letters of both queues: listed, replayed without loss or copy, discarded."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import redis

from tasks.errors import CorruptError
from tasks.traces.dead_letters import FileDeadLetters, RedisDeadLetters, is_replayable
from tasks.traces.queue import FileQueue
from tasks.traces.redis_stream import RedisQueue


def bury(queue, records, reason="422"):
    """Put records into the queue and bury them, as a drain does."""
    queue.append(record if isinstance(record, bytes) else record.to_line() for record in records)
    assert queue.lock()
    items = queue.read(100)
    queue.bury([(item, reason) for item in items])
    queue.ack(items)
    queue.unlock()


@pytest.fixture(params=["file", "redis"])
def stores(request, tmp_path):
    if request.param == "file":
        queue = FileQueue(tmp_path / "q.jsonl")
        yield queue, FileDeadLetters(tmp_path / "q.jsonl")
        queue.close()
    else:
        client = redis.Redis(port=request.getfixturevalue("redis_port"))
        yield RedisQueue(client), RedisDeadLetters(client, "llm_traces")
        client.close()


def test_letters_are_listed_replayed_marked_and_discarded(stores, make_record):
    queue, dead = stores
    assert dead.letters() == []
    assert (dead.replay({"x"}), dead.discard({"x"})) == (0, 0)
    bury(queue, [make_record(n) for n in range(4)] + [b"torn {\n"])
    letters = dead.letters()
    assert [letter.id for letter in letters[:4]] == [make_record(n).trace_id for n in range(4)]
    assert letters[4].id.startswith("line-")
    assert [is_replayable(letter) for letter in letters] == [True] * 4 + [False]
    assert {letter.reason for letter in letters} == {"422"}
    with pytest.raises(CorruptError, match="is no JSON"):
        dead.replay({letters[4].id})
    assert dead.replay({make_record(1).trace_id, make_record(2).trace_id}) == 2
    assert dead.discard({make_record(0).trace_id, letters[4].id}) == 2
    assert [letter.id for letter in dead.letters()] == [make_record(3).trace_id]
    assert queue.lock()
    items = queue.read(10)
    assert [item.record for item in items] == [make_record(n, replayed=True) for n in (1, 2)]
    assert all(item.redelivered for item in items)  # the sink asks for them first


KILLED = """
import os, signal, sys
from pathlib import Path
from tasks import files
from tasks.traces.dead_letters import FileDeadLetters
real = files.write_bytes
def write_bytes(path, data):
    os.kill(os.getpid(), signal.SIGKILL)
files.write_bytes = write_bytes
FileDeadLetters(Path(sys.argv[1])).replay({sys.argv[2]})
"""


def test_a_replay_killed_in_the_middle_loses_nothing_and_the_copy_is_marked(tmp_path, make_record, root):
    queue = FileQueue(tmp_path / "q.jsonl")
    bury(queue, [make_record(1)])
    dead, name = FileDeadLetters(queue.path), make_record(1).trace_id
    argv = [sys.executable, "-c", KILLED, str(queue.path), name]
    assert subprocess.run(argv, env={**os.environ, "PYTHONPATH": str(root)}, timeout=60).returncode == -9
    assert [letter.id for letter in dead.letters()] == [name]  # still here, and in the queue
    assert dead.replay({name}) == 1
    assert queue.lock()
    assert [(item.record.trace_id, item.redelivered) for item in queue.read(10)] == [(name, True), (name, True)]
    queue.close()


def test_letters_buried_while_others_are_discarded_are_all_kept(tmp_path, make_record):
    path = tmp_path / "q.jsonl"
    queue, dead = FileQueue(path), FileDeadLetters(path)
    bury(queue, [make_record(n) for n in range(30)])
    queue.append(make_record(n).to_line() for n in range(30, 90))
    assert queue.lock()
    items = queue.read(100)
    buries = threading.Thread(target=lambda: [queue.bury([(item, "x")]) for item in items])
    buries.start()
    for number in range(30):
        assert dead.discard({make_record(number).trace_id}) == 1
    buries.join()
    assert [letter.id for letter in dead.letters()] == [make_record(n).trace_id for n in range(30, 90)]
    queue.close()


def test_a_torn_last_letter_is_kept_but_not_shown(tmp_path, make_record):
    queue = FileQueue(tmp_path / "q.jsonl")
    bury(queue, [make_record(1), make_record(2)])
    place = Path(f"{queue.path}.dead")
    torn = json.dumps({"reason": "x", "line": "y"})[:10].encode()
    place.write_bytes(place.read_bytes() + torn)
    dead = FileDeadLetters(queue.path)
    assert len(dead.letters()) == 2
    assert dead.discard({make_record(1).trace_id}) == 1
    assert place.read_bytes().endswith(torn)
