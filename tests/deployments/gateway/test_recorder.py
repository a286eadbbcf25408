"""The recorder by itself: clock jumps, fsync, settings; no gateway process."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from deployments.gateway import recorder as subject
from deployments.gateway.fast_json import loads
from deployments.gateway.recorder import Recorder
from deployments.gateway.settings import Settings
from deployments.gateway.trace_settings import TraceSettings, trace_settings_table
from tasks.errors import SpecError
from tasks.traces.record import from_line, us_from_iso
from tasks.traces.redaction import Redactor


def test_the_direct_path_needs_an_account(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    made = Recorder(Settings(queue_path=tmp_path / "q.jsonl"), TraceSettings(direct=True))
    with pytest.raises(SpecError, match="WANDB_API_KEY or WANDB_ENTITY is not set"):
        made.open()


class Clock:
    """The machine's wall clock, which a test sets back and forth; nothing else is changed."""

    def __init__(self):
        self.jump_ns = 0

    def __getattr__(self, name):
        return getattr(time, name)

    def time_ns(self):
        return time.time_ns() + self.jump_ns


@pytest.mark.parametrize("jump_s", [-86_400, -0.5, 0.5, 86_400 * 365])
def test_a_clock_that_jumps_during_a_request_turns_no_time_around(tmp_path, monkeypatch, jump_s):
    clock = Clock()
    monkeypatch.setattr(subject, "time", clock)
    made = Recorder(Settings(queue_path=tmp_path / "q.jsonl"), TraceSettings())
    recording = made.begin("/v1/chat/completions")
    recording.note_first()
    clock.jump_ns = int(jump_s * 1e9)
    time.sleep(0.02)
    recording.finish("ok", 200, {"usage": {"total_tokens": 1}})
    later = made.begin("/v1/chat/completions")
    later.finish("ok", 200)
    first, second = (from_line(line) for line in (tmp_path / "q.jsonl").read_bytes().splitlines())
    assert first.started_at <= first.first_token_at <= first.ended_at
    assert 20 <= first.duration_ms < 2000
    assert abs(us_from_iso(second.started_at) - us_from_iso(first.started_at) - jump_s * 1e6) < 2e6
    assert first.trace_id != second.trace_id


@pytest.mark.parametrize(("fsync_ms", "synced"), [(subject.ALWAYS, 3), (0, 0)])
def test_fsync_always_syncs_each_trace_before_it_returns(tmp_path, monkeypatch, fsync_ms, synced):
    real, sizes = os.fdatasync, []

    def fdatasync(handle):
        if not os.path.isdir(f"/proc/self/fd/{handle}"):  # noqa: PTH112
            sizes.append(os.fstat(handle).st_size)
        real(handle)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    made = Recorder(Settings(queue_path=tmp_path / "q.jsonl", fsync_ms=fsync_ms), TraceSettings())
    made.open()
    ends = []
    for _ in range(3):
        made.begin("/v1/chat/completions").finish("ok", 200)
        ends.append((tmp_path / "q.jsonl").stat().st_size)
    assert sizes == ends[:synced]


def test_settings_of_traces_are_named_when_they_are_wrong(tmp_path):
    with pytest.raises(SpecError) as error:
        TraceSettings.from_environment({"GATEWAY_REDACT": "emails", "GATEWAY_TRACE_SAMPLE": "2"})
    assert "'emails' is no kind; expected some of secrets,email" in str(error.value)
    assert "GATEWAY_TRACE_SAMPLE='2': expected a share 0..1" in str(error.value)
    assert TraceSettings.from_environment({"GATEWAY_REDACT": "none"}).kinds == frozenset()
    assert Settings.from_environment({"GATEWAY_TRACE_FSYNC_MS": "always"}).fsync_ms == subject.ALWAYS
    missing = TraceSettings(patterns=tmp_path / "no.txt")
    with pytest.raises(SpecError, match=r"GATEWAY_REDACT_PATTERNS=.*can't be read"):
        Recorder(Settings(queue_path=tmp_path / "q.jsonl"), missing)


def test_the_documentation_shows_the_settings():
    text = (Path(__file__).parents[3] / "docs" / "traces.md").read_text()
    assert trace_settings_table() in text


def test_traces_of_one_turn_of_the_loop_are_one_write_and_come_before_their_answers(tmp_path):
    queue, seen = tmp_path / "q.jsonl", []
    made = Recorder(Settings(queue_path=queue), TraceSettings())
    made.open()

    def ids():
        return [from_line(line).trace_id for line in queue.read_bytes().splitlines()]

    async def run():
        recordings = [made.begin("/v1/chat/completions") for _ in range(4)]
        for recording in recordings[:2]:
            recording.finish("ok", 200, then=lambda: seen.append(ids()))
        assert (ids(), seen) == ([], [])
        await asyncio.sleep(0)
        first = [recording.trace_id for recording in recordings[:2]]
        assert (ids(), seen) == (first, [first, first])  # both are there before the first answer goes
        recordings[2].finish("ok", 200, then=lambda: seen.append(ids()))
        recordings[3].finish("ok", 200)  # nobody sends its answer later: it is written at once, and what waits with it
        assert ids() == [recording.trace_id for recording in recordings]
        assert seen[2:] == [ids()]
        await asyncio.sleep(0)
        assert len(seen) == 3

    asyncio.run(run())


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_an_answer_is_sent_though_its_trace_is_left_out(tmp_path, rate):
    made = Recorder(Settings(queue_path=tmp_path / "q.jsonl"), TraceSettings(sample_rate=rate))
    made.open()
    seen = []

    async def run():
        made.begin("/v1/chat/completions").finish("ok", 200, then=lambda: seen.append("sent"))
        await asyncio.sleep(0)

    asyncio.run(run())
    assert (seen, made.num_sampled_out) == (["sent"], 1 - rate)


@pytest.mark.parametrize("alone", [False, True])
def test_an_answer_is_sent_though_its_trace_can_not_be_written_whole(tmp_path, monkeypatch, alone):
    """An answer whose token counts nest as deep as can be read, and a fault of the redaction."""
    queue, seen = tmp_path / "q.jsonl", []
    made = Recorder(Settings(queue_path=queue), TraceSettings())
    made.open()
    deep = loads(b'{"model": "m", "usage": {"a": ' + b"[" * 1010 + b"]" * 1010 + b"}}")

    async def run():
        for response in (deep, {"model": "m"}):
            if response is not deep:
                monkeypatch.setattr(Redactor, "redact", None)
            made.begin("/x").finish("ok", 200, response, then=None if alone else lambda: seen.append("sent"))
        await asyncio.sleep(0)

    asyncio.run(run())
    records = [from_line(line) for line in queue.read_bytes().splitlines()]
    assert [(each.model, each.response, each.usage, each.redactions) for each in records] == [
        ("m", None, None, {"bodies": 1})
    ] * 2
    assert seen == ["sent"] * (0 if alone else 2)
