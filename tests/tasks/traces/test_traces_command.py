"""`tatara traces` on both queues: what a person sees, and that looking consumes nothing."""

import json
import os
import subprocess
import sys
import threading

import pyarrow.parquet as pq
import pytest
import redis
from huggingface_hub import HfApi

from deployments import traces
from deployments.cli import main
from tasks.artifacts import ArtifactStore
from tasks.fetch.run import fetch_dataset
from tasks.specs import FetchSpec
from tasks.traces.chats import NoChatError, chat_row
from tasks.traces.peek import peek
from tasks.traces.queue import FileQueue
from tasks.traces.redis_stream import RedisQueue, ship


@pytest.fixture(params=["file", "redis"])
def queue(request, tmp_path, monkeypatch):
    """The queue that the environment names; with Redis, half of what is appended is still in the spool."""
    monkeypatch.setenv("FILE_QUEUE_PATH", str(tmp_path / "q.jsonl"))
    spool = FileQueue(tmp_path / "q.jsonl")
    if request.param == "file":
        yield spool
    else:
        port = request.getfixturevalue("redis_port")
        monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{port}/0")
        client = redis.Redis(port=port)
        yield _Both(spool, RedisQueue(client))
        client.close()
    spool.close()


class _Both:
    def __init__(self, spool, stream):
        self.spool, self.stream = spool, stream

    def append(self, lines):
        lines = list(lines)
        half = len(lines) // 2
        self.spool.append(lines[:half])
        assert self.spool.lock()
        ship(self.spool, self.stream)
        self.spool.unlock()
        self.spool.append(lines[half:])

    def __getattr__(self, name):
        return getattr(self.stream, name)


def chat(make_record, number, **changes):
    request = {"messages": [{"role": "system", "content": "短く"}, {"role": "user", "content": f"質問 {number}"}]}
    message = {"role": "assistant", "content": f"答え {number}"}
    response = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}], "usage": {"total_tokens": 3}}
    return make_record(number, **({"request": request, "response": response, "usage": {"total_tokens": 3}} | changes))


def said(capsys, *arguments, status=0):
    assert main(["traces", *arguments]) == status
    return capsys.readouterr().out


def test_tail_shows_the_last_ones_in_order_and_no_control_characters(queue, make_record, capsys):
    hostile = {"messages": [{"role": "user", "content": "\x1b[2Jhello\nthere"}]}
    queue.append([*(chat(make_record, n).to_line() for n in range(9)), chat(make_record, 9, request=hostile).to_line()])
    lines = said(capsys, "tail", "-n", "4").splitlines()
    assert [line.split("  ")[-2] for line in lines] == [make_record(n).trace_id for n in (6, 7, 8, 9)]
    assert "質問 8" in lines[2]
    assert lines[3].endswith(" [2Jhello there")
    assert "ok  200  vllm  tiny  2 ms  3 tokens" in lines[0].replace("  2 ms", "  2 ms")
    assert said(capsys, "tail", "-n", "0") == ""


def test_tail_follows_what_comes_in(queue, make_record, monkeypatch, capsys):
    queue.append(chat(make_record, n).to_line() for n in range(3))
    rounds = []

    def sleep(seconds):
        rounds.append(seconds)
        if len(rounds) == 1:
            queue.append(chat(make_record, n).to_line() for n in range(3, 7))
        if len(rounds) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(traces.time, "sleep", sleep)
    assert main(["traces", "tail", "-n", "2", "--follow"]) == 130
    found = {line.split("  ")[-2] for line in capsys.readouterr().out.splitlines()}
    assert {make_record(n).trace_id for n in (1, 2)} <= found
    assert {make_record(n).trace_id for n in (3, 4)} <= found  # with Redis, what is in the stream; 5 and 6 are not yet


def test_stats_count_and_restore_what_sampling_left_out(queue, make_record, capsys):
    records = [chat(make_record, n, sample_rate=0.25) for n in range(4)]
    records.append(chat(make_record, 4, status="error", http_status=500, redactions={"email": 2}, key_name="team-a"))
    queue.append([*(record.to_line() for record in records), b"torn {\n"])
    found = json.loads(said(capsys, "stats", "--json"))
    assert (found["waiting"], found["unreadable"], found["requests_before_sampling"]) == (6, 1, 17)
    assert (found["status"], found["redactions"]) == ({"ok": 4, "error": 1}, {"email": 2})
    assert (found["oldest"], found["total_tokens"], found["dead_letters"]) == (records[0].started_at, 15, 0)
    assert found["key_name"] == {"None": 4, "team-a": 1}
    assert "waiting                   6" in said(capsys, "stats")


def test_export_writes_every_record_and_consumes_none(queue, make_record, tmp_path, capsys):
    records = [chat(make_record, n) for n in range(7)]
    queue.append(record.to_line() for record in records)
    for _ in range(2):
        said(capsys, "export", str(tmp_path / "out.jsonl"))
        lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
        assert sorted(lines) == sorted(record.to_line() for record in records)
    path = tmp_path / "q.jsonl"
    assert len(list(peek(path, traces.connect_redis(os.environ)))) == 7


def test_exported_chats_are_a_data_set_that_fetch_reads(queue, make_record, tmp_path, capsys):
    good = [chat(make_record, n) for n in range(20)]
    bad = [
        chat(make_record, 20, status="cancelled"),
        chat(make_record, 21, route="maintenance"),
        chat(make_record, 22, redactions={"email": 1}),
        chat(make_record, 23, request=None, response=None),
    ]
    queue.append(record.to_line() for record in [*good, *bad])
    out = tmp_path / "chats.jsonl"
    text = said(capsys, "export", str(out), "--chats")
    assert text.splitlines()[0] == f"20 chats in {out}"
    assert text.count("left out") == 4
    store = ArtifactStore(tmp_path / "store")
    made = fetch_dataset(FetchSpec(source=str(out), validation_pct=20), store, HfApi(token=False))
    assert made.num_train_rows + made.num_validation_rows == 20
    assert made.num_rejected_rows == 0
    rows = [
        row for name in ("train", "validation") for row in pq.read_table(f"{made.folder}/{name}.parquet").to_pylist()
    ]
    assert {"role": "assistant", "content": "答え 7"} in [row["messages"][-1] for row in rows]
    assert "21 chats" in said(capsys, "export", str(out), "--chats", "--with-redacted")


def test_dead_letters_are_settled_by_commands(queue, make_record, tmp_path, capsys):
    assert said(capsys, "dead", "list") == "no dead letters\n"
    queue.append(chat(make_record, n).to_line() for n in range(3))
    queue.append([b"torn {\n", b"torn [\n"])
    stream = getattr(queue, "stream", queue)
    if stream is not queue:
        assert queue.spool.lock()
        while ship(queue.spool, stream):
            pass
        queue.spool.unlock()
    assert stream.lock()
    items = stream.read(10)
    stream.bury([(item, "Weave refused it with 422") for item in items])
    stream.ack(items)
    stream.unlock()
    lines = said(capsys, "dead", "list").splitlines()
    assert len(lines) == 5
    ids = [line.split()[0] for line in lines]
    assert ids[0] == make_record(0).trace_id
    assert "質問 0" in said(capsys, "dead", "show", ids[0])
    assert main(["traces", "dead", "show", "nobody"]) == 1
    assert "there is no dead letter nobody" in capsys.readouterr().err
    torn = next(name for name in ids if name.startswith("line-"))
    assert main(["traces", "dead", "replay", torn]) == 1
    assert "is no JSON object" in capsys.readouterr().err
    assert said(capsys, "export", str(tmp_path / "all.jsonl"), "--dead").startswith("3 records")
    assert said(capsys, "dead", "replay", ids[0]) == "1 dead letters are in the queue again\n"
    assert said(capsys, "dead", "replay") == "2 dead letters are in the queue again\n"
    assert said(capsys, "dead", "discard", torn) == "1 dead letters discarded\n"
    assert json.loads(said(capsys, "stats", "--json"))["waiting"] == 3


def test_the_command_starts_in_its_own_process_without_prefect(root, tmp_path):
    code = "import sys, deployments.traces; print(sorted({'prefect', 'torch', 'wandb'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(root), "FILE_QUEUE_PATH": str(tmp_path / "none" / "q.jsonl")}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "[]", found.stderr
    argv = [sys.executable, "-m", "deployments.cli", "traces", "stats", "--json"]
    found = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert json.loads(found.stdout)["waiting"] == 0


def test_a_wrong_redis_url_is_named(monkeypatch, capsys):
    monkeypatch.setenv("REDIS_URL", "nonsense")
    assert main(["traces", "stats"]) == 1
    assert "REDIS_URL is no redis://" in capsys.readouterr().err


def test_looking_while_a_drain_consumes_sees_nothing_twice(tmp_path, make_record):
    queue = FileQueue(tmp_path / "q.jsonl", segment_bytes=5000)
    queue.append(make_record(n).to_line() for n in range(300))
    assert queue.lock()

    def consume():
        while items := queue.read(7):
            queue.ack(items)

    consumer = threading.Thread(target=consume)
    consumer.start()
    while consumer.is_alive():
        seen = [item.record.usage["completion_tokens"] for item in peek(queue.path, None) if item.record]
        assert seen == sorted(set(seen))
    consumer.join()
    queue.close()


RESPONSES = {
    "output": [{"type": "reasoning"}, {"type": "message", "content": [{"type": "output_text", "text": "はい"}]}]
}


@pytest.mark.parametrize(
    ("request_body", "response", "expected"),
    [
        ({"input": "質問", "instructions": "短く"}, RESPONSES, ["短く", "質問", "はい"]),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]}, RESPONSES, ["a", "はい"]),
        ({"messages": []}, {}, "no messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, {}, "a message of a tool"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, {}, "a content that is no text"),
        ({"messages": [{"role": "user", "content": " "}]}, {}, "a content that is empty"),
        ({"input": "x"}, {"choices": [{"finish_reason": "length", "message": {"content": "a"}}]}, "ended by length"),
        ({"input": "x"}, {"choices": [{"message": {"tool_calls": [{}]}}]}, "calls a tool"),
        ({"input": "x"}, {}, "no whole answer"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, RESPONSES, "do not alternate"),
    ],
)
def test_rows_of_chats_and_reasons_against(make_record, request_body, response, expected):
    record = make_record(1, request=request_body, response=response)
    if isinstance(expected, str):
        with pytest.raises(NoChatError, match=expected):
            chat_row(record)
    else:
        assert [message["content"] for message in chat_row(record)["messages"]] == expected
