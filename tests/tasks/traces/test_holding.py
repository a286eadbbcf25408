"""A disk that takes no writes, and how much waits in a queue that nobody locks."""

import errno
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.traces.backlog import _BUFFER_BYTES, Backlog
from tasks.traces.holding import HoldingWriter
from tasks.traces.queue import FileQueue
from tasks.traces.segments import SegmentWriter


class Disk(SegmentWriter):
    """A writer whose disk can be full; everything else is the real one."""

    full = False

    def append(self, lines):
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().append(lines)


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path / "q.jsonl")
    yield made
    made.close()


def patient(writer, **limits):
    return HoldingWriter(writer, **({"max_lines": 100, "max_bytes": 10_000} | limits))


def flush(writer):
    writer._try_at = 0.0
    return writer.flush()


def test_what_the_disk_refused_is_written_in_order_once_it_takes_it(disk, caplog):
    writer = patient(disk)
    writer.append(b"0\n")
    disk.full = True
    for number in (1, 2, 3):
        writer.append(b"%d\n" % number)
    assert (writer.num_written, writer.num_held, writer.held_bytes, writer.num_lost) == (1, 3, 6, 0)
    assert "No space left on device" in caplog.text
    assert not flush(writer)
    disk.full = False
    writer._try_at = 0.0
    writer.append(b"4\n")
    assert disk.path.read_bytes() == b"0\n1\n2\n3\n4\n"
    assert (writer.num_written, writer.num_held, writer.held_bytes) == (5, 0, 0)


@pytest.mark.parametrize("limits", [{"max_lines": 2}, {"max_bytes": 4}])
def test_only_what_overflows_the_hold_is_lost_and_counted(disk, limits):
    writer = patient(disk, **limits)
    disk.full = True
    for number in range(5):
        writer.append(b"%d\n" % number)
    assert (writer.num_held, writer.num_lost) == (2, 3)
    disk.full = False
    assert flush(writer)
    assert disk.path.read_bytes() == b"0\n1\n"


def test_lines_that_come_together_are_one_write_and_are_held_one_by_one(disk):
    writer = patient(disk, max_lines=2)
    writer.append(b"0\n", b"1\n")
    disk.full = True
    writer.append(b"2\n", b"3\n", b"4\n")
    assert (writer.num_written, writer.num_held, writer.num_lost) == (2, 2, 1)
    disk.full = False
    assert flush(writer)
    assert disk.path.read_bytes() == b"0\n1\n2\n3\n"


def test_at_the_end_what_is_held_is_written_or_counted_as_lost(disk):
    writer = patient(disk)
    disk.full = True
    writer.append(b"0\n")
    writer.give_up()
    assert (writer.num_held, writer.num_lost) == (0, 1)


def test_at_the_end_a_long_hold_is_written_whole(disk):
    """As it was lost but for its first piece; and a disk that took nothing just now may do so again."""
    writer = patient(disk, max_bytes=1 << 30)
    disk.full = True
    for number in range(5):
        writer.append(b"%d" % number * 200_000 + b"\n")
    disk.full = False
    writer.give_up()
    assert (writer.num_held, writer.held_bytes, writer.num_lost, writer.num_written) == (0, 0, 0, 5)
    assert [line[:1] for line in disk.path.read_bytes().splitlines()] == [b"0", b"1", b"2", b"3", b"4"]


def test_a_long_hold_is_written_in_pieces(disk):
    writer = patient(disk, max_bytes=1 << 30)
    disk.full = True
    for _ in range(5):
        writer.append(b"x" * 200_000 + b"\n")
    disk.full = False
    assert [flush(writer) for _ in range(5)] == [False] * 4 + [True]


@settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10_000))
def test_the_backlog_counts_what_a_drain_would_read(tmp_path_factory, make_record, seed):
    dice = random.Random(seed)
    queue = FileQueue(tmp_path_factory.mktemp("q") / "q.jsonl", segment_bytes=4000)
    backlog, made, done = Backlog(queue.path), 0, 0
    assert backlog.look().waiting == 0
    assert queue.lock()
    for _ in range(12):
        if dice.random() < 0.6:
            count = dice.randint(1, 6)
            queue.append(make_record(n).to_line() for n in range(made, made + count))
            made += count
        elif items := queue.read(dice.randint(1, 9)):
            queue.ack(items)
            done += len(items)
        if dice.random() < 0.7:
            state = backlog.look()
            assert state.waiting == made - done
            assert state.oldest_at == (make_record(done).started_at if made > done else None)
            assert (state.waiting_bytes > 0) is (made > done)
    assert backlog.look().waiting == Backlog(queue.path).look().waiting == made - done
    queue.close()


def test_a_backlog_of_many_buffers_is_counted_to_the_record(tmp_path, make_record):
    queue = FileQueue(tmp_path / "q.jsonl")
    line = make_record(0).to_line()
    count = 3 * _BUFFER_BYTES // len(line)
    queue.append([line] * count)
    assert queue.lock()
    queue.ack(queue.read(count - 7))
    state = Backlog(queue.path).look()
    assert (state.waiting, state.waiting_bytes) == (7, 7 * len(line))
    queue.close()


def test_a_queue_that_is_not_there_has_no_backlog(tmp_path):
    assert Backlog(tmp_path / "no" / "q.jsonl").look().waiting == 0
