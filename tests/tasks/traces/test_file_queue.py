import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.errors import CorruptError
from tasks.traces.queue import FileQueue
from tasks.traces.segments import SegmentWriter, sealed_segments


def numbers(items):
    return [item.record.usage["completion_tokens"] for item in items if item.record]


@pytest.fixture
def queue(tmp_path):
    made = FileQueue(tmp_path / "sub" / "traces.jsonl")
    yield made
    made.close()


def test_records_come_back_in_order_and_once(queue, make_record):
    queue.append(make_record(n).to_line() for n in range(5))
    assert queue.lock()
    first = queue.read(3)
    assert numbers(first) == [0, 1, 2]
    queue.ack(first)
    assert numbers(queue.read(10)) == [3, 4]
    assert queue.read(10) == []


def test_what_was_not_acknowledged_is_read_again_and_what_was_tried_is_marked(tmp_path, make_record):
    path = tmp_path / "q.jsonl"
    first = FileQueue(path)
    first.append(make_record(n).to_line() for n in range(6))
    assert first.lock()
    first.ack(first.read(2))
    tried = first.read(2)
    first.intend(tried)
    first.close()  # as after a SIGKILL: the kernel frees the lock
    second = FileQueue(path)
    assert second.lock()
    items = second.read(10)
    assert numbers(items) == [2, 3, 4, 5]
    assert [item.redelivered for item in items] == [True, True, False, False]
    assert second.lag() == (0, None)
    second.rewind()
    assert second.lag() == (4, make_record(2).started_at)
    second.close()


def test_two_consumers_at_once_read_nothing_twice(tmp_path, make_record):
    one, two = FileQueue(tmp_path / "q.jsonl"), FileQueue(tmp_path / "q.jsonl")
    assert one.lock()
    assert not two.lock()
    one.unlock()
    assert two.lock()
    two.close()


def test_a_torn_last_line_is_left_alone_until_a_writer_ends_it(queue, make_record):
    line = make_record(1).to_line()
    queue.append([make_record(0).to_line()])
    queue._writer.close()
    with queue.path.open("ab") as torn:
        torn.write(line[:40])
    assert queue.lock()
    first = queue.read(10)
    assert numbers(first) == [0]
    queue.ack(first)
    assert queue.read(10) == []
    queue.append([make_record(2).to_line()])
    items = queue.read(10)
    assert numbers(items) == [2]
    assert [item.problem for item in items] == ["a line of 41 bytes is no JSON (JSONDecodeError)", ""]


def test_a_write_that_the_disk_cut_short_costs_only_itself(queue, make_record, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: len(data) // 2]))
    with pytest.raises(OSError, match="is the disk full"):
        queue.append([make_record(0).to_line()])
    monkeypatch.undo()
    queue.append([make_record(1).to_line()])
    assert queue.lock()
    assert numbers(queue.read(10)) == [1]


@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.integers(1, 7), max_size=12),
    st.integers(200, 4000),
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=12),
)
def test_segments_lose_and_double_nothing(tmp_path_factory, make_record, appends, segment_bytes, reads):
    path = tmp_path_factory.mktemp("q") / "q.jsonl"
    writer, made, seen = SegmentWriter(path, segment_bytes), 0, []
    for index, (limit, restart) in enumerate(reads):
        for _ in range(appends[index] if index < len(appends) else 0):
            writer.append([make_record(made).to_line()])
            made += 1
        consumer = FileQueue(path)
        assert consumer.lock()
        items = consumer.read(limit)
        if items and not restart:
            consumer.ack(items)
            seen += numbers(items)
        consumer.close()
    consumer = FileQueue(path)
    assert consumer.lock()
    while items := consumer.read(3):
        consumer.ack(items)
        seen += numbers(items)
    assert seen == list(range(made))
    assert len(sealed_segments(path)) <= 1  # only the last finished one may wait for the next ack
    writer.close()
    consumer.close()


WRITE = """
import sys
from pathlib import Path
from tasks.traces.segments import SegmentWriter
writer = SegmentWriter(Path(sys.argv[1]), 20_000)
for number in range(400):
    writer.append([b'{"writer": %s, "number": %d, "pad": "%s"}\\n' % (sys.argv[2].encode(), number, b"x" * 300)])
"""


def test_several_writers_and_a_reader_at_once(tmp_path, root):
    path = tmp_path / "q.jsonl"
    argv = [sys.executable, "-c", WRITE, str(path)]
    writers = [subprocess.Popen([*argv, str(n)], env={**os.environ, "PYTHONPATH": str(root)}) for n in range(3)]
    consumer, seen = FileQueue(path), []
    assert consumer.lock()
    while True:
        done = all(writer.poll() is not None for writer in writers)
        while items := consumer.read(37):
            seen += [(value["writer"], value["number"]) for value in (json.loads(item.line) for item in items)]
            consumer.ack(items)
        if done:
            break
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert len(seen) == len(set(seen)) == 1200
    for writer in range(3):
        assert [number for who, number in seen if who == writer] == list(range(400))


def test_dead_letters_keep_line_and_reason(queue, make_record):
    queue.append([make_record(1).to_line()])
    assert queue.lock()
    item = queue.read(1)[0]
    queue.bury([(item, "Weave refused it with 422")])
    letter = json.loads(Path(f"{queue.path}.dead").read_text())
    assert letter["reason"] == "Weave refused it with 422"
    assert json.loads(letter["line"])["trace_id"] == item.record.trace_id


def test_a_file_that_a_person_emptied_is_met_with_a_warning(queue, make_record, caplog):
    queue.append(make_record(n).to_line() for n in range(3))
    assert queue.lock()
    queue.ack(queue.read(3))
    queue.unlock()
    os.truncate(queue.path, 0)
    queue.append([make_record(9).to_line()])
    assert queue.lock()
    assert numbers(queue.read(10)) == [9]
    assert "was cut or removed" in caplog.text


def test_a_cursor_that_is_none_is_named(queue, make_record):
    queue.append([make_record(0).to_line()])
    Path(f"{queue.path}.cursor").write_text('{"acked": 3}')
    with pytest.raises(CorruptError, match=r"traces\.jsonl\.cursor is no cursor"):
        queue.lock()


def test_sync_may_run_in_another_thread_while_segments_are_sealed(tmp_path, make_record):
    from tasks.traces.segments import sync_and_close

    writer = SegmentWriter(tmp_path / "q.jsonl", 5000)
    for number in range(50):
        writer.append([make_record(number).to_line()])
        handles = writer.sync_handles()
        if handles:
            thread = threading.Thread(target=sync_and_close, args=(handles,))
            thread.start()
            thread.join()
    assert not writer.sync_handles()
    writer.close()
