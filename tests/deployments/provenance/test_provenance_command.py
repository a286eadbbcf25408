"""From an answer to its rows and from a row to its models, on a store with two tunes of one data set."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from deployments import cli
from deployments.provenance import command as subject
from deployments.provenance.answers import find_trace, looks_like_answer
from tasks.artifacts import ArtifactStore, FetchedDataset, HealthReport, ServedModel, TrainedAdapter
from tasks.errors import MissingError
from tasks.fetch.run import fetch_dataset
from tasks.specs import FetchSpec
from tasks.traces.queue import FileQueue, QueuedTrace
from tests.chain import commit, commit_base, commit_chain, commit_packed, names
from tests.records import make_record
from tests.tiny import write_chats

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Made:
    store: ArtifactStore
    dataset: FetchedDataset
    first: ServedModel
    second: ServedModel
    variables: dict[str, str]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    store = ArtifactStore(tmp_path / "home")
    chats = write_chats(tmp_path / "chats.jsonl", 20)
    dataset = fetch_dataset(FetchSpec(source=str(chats), validation_pct=30.0), store, HfApi(token=False))
    base = commit_base(store)
    packed = commit_packed(store, dataset, base)
    first = commit_chain(store, packed, base, tmp_path, digest="1f" * 32, url="http://127.0.0.1:1")
    second = commit_chain(store, packed, base, tmp_path, digest="2e" * 32, url="http://127.0.0.1:2")
    health = HealthReport(
        **names(store, HealthReport, "h", first),
        passed=True,
        served_logprob=-1.0,
        merged_logprob=-1.0,
        base_logprob=-2.0,
        token_gap=0.0,
        tuning_gap=1.0,
        num_answers=1,
        question="?",
        answer="!",
        gateway_url="",
        served_model_name="tiny",
    )
    commit(store, health)
    runs = store.root / "runs" / "0190aaaa-bbbb-7ccc-8ddd-eeeeffff0000"
    runs.mkdir(parents=True)
    (runs / "recipe.json").write_text(json.dumps({"recipe": "tiny", "resolved": {"base": {"model": "owner/base"}}}))
    monkeypatch.setenv("FILE_QUEUE_PATH", str(tmp_path / "q.jsonl"))
    variables = {"FILE_QUEUE_PATH": str(tmp_path / "q.jsonl")}
    return Made(store, dataset, first, second, variables)


def _answer(made: Made, number: int = 1, **changes: Any):
    told = {"model_digest": made.first.model_digest, "adapter_digest": f"adapter-{made.first.model_digest}"}
    return make_record(number, **(told | {"run_id": "0190aaaa-bbbb-7ccc-8ddd-eeeeffff0000"} | changes))


def _queue(made: Made) -> FileQueue:
    return FileQueue(Path(made.variables["FILE_QUEUE_PATH"]))


def test_an_answer_leads_to_run_recipe_adapter_and_every_row(made: Made, capsys: pytest.CaptureFixture[str]):
    record = _answer(made)
    _queue(made).append([_answer(made, 0).to_line(), record.to_line()])
    assert cli.main(["provenance", record.trace_id]) == 0
    text = capsys.readouterr().out
    assert "recipe tiny, base owner/base" in text and "verification passed" in text
    order = ["served/", "published/", "owner/tuned@", "merged/", "adapter/", "packed/", "dataset/", "chats.jsonl"]
    places = [text.index(word) for word in order]
    assert places == sorted(places)
    assert made.second.short not in text
    assert cli.main(["provenance", record.trace_id, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "answer" and found["trace"]["run_id"] == record.run_id
    assert found["run"]["recipe"] == "tiny"
    [rows] = found["data_rows"].values()
    assert len(rows["train"]) == made.dataset.num_train_rows and len(rows["validation"]) > 0
    assert cli.main(["provenance", record.trace_id, "--rows"]) == 0
    listed = capsys.readouterr().out
    assert all(f"row {row_id}\n" in listed for row_id in rows["train"])


def test_the_id_in_the_answers_body_will_do(made: Made):
    """vLLM writes the x-request-id into it; another server's id is found as it is."""
    own = _answer(made, 3, response={"id": "chatcmpl-9f8e7d", "choices": []})
    _queue(made).append([own.to_line()])
    for wanted in (f"chatcmpl-{own.trace_id}", own.trace_id.upper(), "chatcmpl-9f8e7d"):
        assert looks_like_answer(wanted)
        found = subject.explain(wanted, made.store.root, made.variables)
        assert found.trace is not None and found.trace.trace_id == own.trace_id


def test_an_answer_is_found_after_it_was_acknowledged_and_among_dead_letters(made: Made):
    acked, dead = _answer(made, 1), _answer(made, 2)
    queue = _queue(made)
    queue.append([acked.to_line(), dead.to_line()])
    assert queue.lock()
    items = queue.read(10)
    queue.bury([(items[1], "refused")])
    queue.ack(items)
    queue.close()
    for record in (acked, dead):
        trace, _ = find_trace(record.trace_id, made.store.root, made.variables)
        assert trace is not None and trace.model_digest == made.first.model_digest
    Path(made.variables["FILE_QUEUE_PATH"]).unlink()  # what a person may do once all is delivered
    trace, _ = find_trace(dead.trace_id, made.store.root, made.variables)
    assert trace is not None and trace.place == "dead letters"


def test_an_answer_is_found_in_a_wandb_offline_run(made: Made):
    from tasks.traces.wandb_sink import WandbOfflineSink

    records = [_answer(made, number) for number in range(3)]
    items = [QueuedTrace(id=str(i), line=b"", record=record) for i, record in enumerate(records)]
    WandbOfflineSink(made.store.root / "traces", "tatara").deliver(items)
    trace, looked = find_trace(records[1].trace_id, made.store.root, made.variables)
    assert trace is not None and "offline-run" in trace.place
    assert (trace.model_digest, trace.run_id) == (records[1].model_digest, records[1].run_id)
    assert len(looked) == 3


def test_an_answer_that_is_only_in_weave_is_asked_for_with_the_keys_account(made: Made, weave: Any):
    import httpx

    from tasks.traces.spec import DrainSpec
    from tasks.traces.weave_sink import WeaveSink

    records = [_answer(made, number) for number in range(3)]
    items = [QueuedTrace(id=str(i), line=record.to_line(), record=record) for i, record in enumerate(records)]
    WeaveSink(httpx.Client(base_url=weave.url, auth=("api", "k" * 40)), "team/tatara", DrainSpec()).deliver(items)
    there = {"WANDB_API_KEY": "k" * 40, "WANDB_ENTITY": "team", "WF_TRACE_SERVER_URL": weave.url}
    found = subject.explain(records[1].trace_id, made.store.root, made.variables | there)
    assert found.trace is not None and found.trace.place == "Weave, project team/tatara"
    assert (found.trace.model_digest, found.trace.run_id) == (records[1].model_digest, records[1].run_id)
    assert (found.trace.model, found.trace.status) == ("tiny", "ok")
    assert "k" * 40 not in json.dumps(found.values()) + "\n".join(found.lines())
    trace, _ = find_trace(records[1].trace_id, made.store.root, made.variables | there | {"WANDB_PROJECT": "other"})
    assert trace is None


def test_an_answer_is_found_in_redis(made: Made, redis_port: int):
    import redis

    from tasks.traces.redis_stream import RedisQueue

    record = _answer(made)
    url = f"redis://127.0.0.1:{redis_port}"
    RedisQueue(redis.Redis.from_url(url)).append([_answer(made, 0).to_line(), record.to_line()])
    trace, looked = find_trace(record.trace_id, made.store.root, made.variables | {"REDIS_URL": url})
    assert trace is not None and trace.place == "Redis stream llm_traces" and len(looked) == 3


def test_an_unknown_answer_lists_where_it_was_looked_for(made: Made, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["provenance", "0190aaaa-bbbb-7ccc-8ddd-000000000000"]) == 1
    said = capsys.readouterr().err
    for place in (
        "flow runs below",
        "the queue",
        "dead letters",
        "W&B offline runs",
        "Set TATARA_HOME",
        "WANDB_API_KEY",
    ):
        assert place in said
    with pytest.raises(MissingError, match=r"Weave, project team/tatara \(could not be asked: Weave at http://127"):
        away = {"WANDB_API_KEY": "k", "WANDB_ENTITY": "team", "WF_TRACE_SERVER_URL": "http://127.0.0.1:9"}
        subject.explain("0190aaaa-bbbb-7ccc-8ddd-000000000000", made.store.root, made.variables | away)


def test_an_answer_of_a_cleared_or_unknown_model_says_so(made: Made):
    _queue(made).append(
        [
            _answer(made, 1, model_digest="ab" * 32, adapter_digest=None, run_id="gone").to_line(),
            _answer(made, 2, model_digest=None, adapter_digest=None, run_id=None, route="lite").to_line(),
        ]
    )
    text = "\n".join(subject.explain(_answer(made, 1).trace_id, made.store.root, made.variables).lines())
    assert "has these digests: set TATARA_HOME" in text and "its recipe is not in this store" in text
    text = "\n".join(subject.explain(_answer(made, 2).trace_id, made.store.root, made.variables).lines())
    assert "was not told which model it serves" in text and "served by no flow run" in text


def test_an_answer_of_a_merge_that_was_cleared_away_goes_on_to_the_adapter(made: Made):
    import shutil

    shutil.rmtree(made.store.root / "merged")
    found = subject.explain(made.first.ref, made.store.root, made.variables)
    text = "\n".join(found.lines())
    assert "(cleared away)" in text and "adapter/" not in text  # the chain ends where its manifest is gone
    _queue(made).append([_answer(made, 1).to_line()])
    shutil.rmtree(made.store.root / "served")
    shutil.rmtree(made.store.root / "published")
    text = "\n".join(subject.explain(_answer(made, 1).trace_id, made.store.root, made.variables).lines())
    assert "made of:\nadapter/" in text and "chats.jsonl" in text


def _a_row(made: Made, split: str) -> tuple[str, str]:
    import pyarrow.parquet as pq

    row = pq.read_table(made.dataset.path / f"{split}.parquet").to_pylist()[0]
    return row["row_id"], "\n".join(message["content"] for message in row["messages"])


def test_a_row_leads_to_every_model_it_went_into(made: Made, capsys: pytest.CaptureFixture[str]):
    row_id, said = _a_row(made, "train")
    assert cli.main(["provenance", row_id]) == 0
    by_id = capsys.readouterr().out
    for ref in (made.first, made.second):
        assert f"served/{ref.short}" in by_id
    assert by_id.count("adapter/") == 2 and by_id.count("owner/tuned@") == 2 and "verification passed" in by_id
    assert f"row {row_id} of dataset/{made.dataset.short}, train, hash " in by_id
    digest = by_id.split("hash ")[1][:16]
    for wanted in (said, digest):
        found = subject.explain(wanted, made.store.root, made.variables)
        assert [row.row_id for row in found.rows] == [row_id]
    assert found.values()["rows"][0]["hash"].startswith(digest)


def test_a_validation_row_was_measured_and_not_learnt(made: Made):
    row_id, _ = _a_row(made, "validation")
    assert "(measured, not learnt)" in "\n".join(subject.explain(row_id, made.store.root, made.variables).lines())


def test_a_rejected_row_went_nowhere(tmp_path: Path):
    chats = write_chats(tmp_path / "chats.jsonl", 20)
    chats.write_text(chats.read_text() + '{"messages": []}\n')
    store = ArtifactStore(tmp_path / "home")
    spec = FetchSpec(source=str(chats), validation_pct=30.0, max_rejected_pct=50)
    fetch_dataset(spec, store, HfApi(token=False))
    found = subject.explain("chats.jsonl:21", store.root, {"FILE_QUEUE_PATH": str(tmp_path / "q")})
    assert "rejected: messages is empty; it went into no model" in found.head[0] and not found.down


def test_a_row_that_packing_dropped_is_told(made: Made):
    row_id, _ = _a_row(made, "train")
    other = next(row for row in subject.row_ids(made_node(made), "train") if row != row_id)
    base = commit_base(made.store)
    commit_packed(made.store, made.dataset, base, "d", {"num_dropped": 1, "dropped_rows": [row_id]})
    commit_packed(made.store, made.dataset, base, "e", {"num_dropped": 1})  # by an older version
    text = "\n".join(subject.explain(row_id, made.store.root, made.variables).lines())
    assert f"DROPPED here, too long: {row_id}" in text and "this row may be one of them" in text
    assert "DROPPED" not in "\n".join(subject.explain(other, made.store.root, made.variables).lines())


def test_a_training_of_less_than_an_epoch_may_have_missed_the_row(made: Made):
    """The chain's adapters made one step of one row, its packed set has eight."""
    row_id, _ = _a_row(made, "train")
    text = "\n".join(subject.explain(row_id, made.store.root, made.variables).lines())
    assert text.count("learnt 1 of 8 packed rows: this one may not be among them") == 2
    [node] = subject.read_lineage(made.store.root).of_kind("packed")
    adapter = subject.Node(ref="adapter/a", folder="/x", parents=(node.ref,), fields={"num_steps": 4}, spec={})
    assert subject._unreached(adapter, subject.read_lineage(made.store.root))
    whole = subject.Node(
        ref="adapter/a", folder="/x", parents=(node.ref,), fields={"num_steps": 4}, spec={"rows_per_device": 2}
    )
    assert not subject._unreached(whole, subject.read_lineage(made.store.root))


def made_node(made: Made):
    return subject.read_lineage(made.store.root).get(made.dataset.ref)


def test_artifacts_digests_commits_and_runs_are_ids_too(made: Made):
    published = made.store.load(made.first.parents[0])
    assert published.kind == "published"
    for wanted in (made.first.ref, made.first.key[:12], made.first.model_digest, published.commit[:10]):  # pyright: ignore
        found = subject.explain(wanted, made.store.root, made.variables)
        assert found.kind == "artifact" and found.up
        assert made.dataset.ref in {node.ref for branch in found.up for node in branch.walk()}
    [adapter] = [a for a in made.store.committed(TrainedAdapter) if a.adapter_digest.endswith(made.second.model_digest)]
    found = subject.explain(adapter.adapter_digest, made.store.root, made.variables)
    assert made.second.ref in {node.ref for branch in found.down for node in branch.walk()}
    run = subject.explain("0190aaaa-bbbb-7ccc-8ddd-eeeeffff0000", made.store.root, made.variables)
    assert run.kind == "run" and "recipe tiny" in run.head[1]


@pytest.mark.parametrize("wanted", ["no such row", "ab", "dataset/ffff", "0" * 20])
def test_what_is_nothing_is_an_error_that_lists_the_places(made: Made, wanted: str):
    with pytest.raises(MissingError, match=r"artifacts below .*\n.*rows of 1 data sets\n.*the queue"):
        subject.explain(wanted, made.store.root, made.variables)


def test_it_starts_without_prefect_and_torch(made: Made):
    record = _answer(made)
    _queue(made).append([record.to_line()])
    code = (
        "import sys; from deployments.cli import main; main(sys.argv[1:])\n"
        "bad = {'prefect', 'torch', 'transformers', 'wandb'} & set(sys.modules); assert not bad, bad"
    )
    env = {**os.environ, **made.variables, "TATARA_HOME": str(made.store.root), "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", code, "provenance", record.trace_id]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dataset/" in done.stdout


def test_hundreds_of_artifacts_are_read_in_a_moment(made: Made):
    """600 chains, 2,400 manifests and more: CPU seconds, on a slow machine twice the bound."""
    source = made.store.root / "served" / made.first.key[:16] / "manifest.json"
    text = source.read_text()
    for number in range(600):
        key = f"{number:064x}"
        folder = made.store.root / "served" / f"{number:016d}"
        folder.mkdir()
        (folder / "manifest.json").write_text(text.replace(made.first.key, key))
    begin = time.process_time()
    found = subject.explain(_a_row(made, "train")[0], made.store.root, made.variables)
    found.lines()
    assert time.process_time() - begin < 2.0
    assert sum(1 for branch in found.down for node in branch.walk() if node.kind == "served") == 602
