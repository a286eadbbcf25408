"""Packed rows hold exactly the rendered documents, in rows of the asked length, with TRL's own packing."""

import json
import tracemalloc
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.artifacts import ArtifactStore, BaseCheckpoint, FetchedDataset, PackedDataset
from tasks.errors import DataError, SpecError
from tasks.fetch.run import fetch_dataset
from tasks.pack import render
from tasks.pack import run as subject
from tasks.specs import FetchSpec, PackSpec
from tests.tiny import byte_tokenizer, make_base, write_chats

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ArtifactStore, BaseCheckpoint, FetchedDataset]:
    folder = tmp_path_factory.mktemp("pack")
    store = ArtifactStore(folder / "home")
    source = write_chats(folder / "chats.jsonl", 60)
    dataset = fetch_dataset(FetchSpec(source=str(source), validation_pct=20), store, HfApi(token=False))
    return store, make_base(store, folder / "base"), dataset


def _rows(packed: PackedDataset, split: str) -> list[dict[str, Any]]:
    return pq.read_table(packed.path / f"{split}.parquet").to_pylist()


def _pieces(rows: list[dict[str, Any]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut rows at their seq_lengths into (input_ids, labels)."""
    pieces = []
    for row in rows:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"])
        start = 0
        for length in row["seq_lengths"]:
            end = start + length
            pieces.append((tuple(row["input_ids"][start:end]), tuple(row["labels"][start:end])))
            start = end
    return sorted(pieces)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("spec", [PackSpec(row_tokens=200), PackSpec(row_tokens=96, packing=False, loss_on="all")])
def test_rows_hold_the_rendered_documents_and_no_more(made: Any, split: str, spec: PackSpec):
    store, base, dataset = made
    packed = subject.pack_dataset(dataset, base, spec, store)
    rows = _rows(packed, split)
    assert all(0 < len(row["input_ids"]) <= spec.row_tokens for row in rows)
    source = pq.read_table(dataset.path / f"{split}.parquet").to_pylist()
    documents = render.render_chats(source, TOKENIZER, spec)
    expected = [(tuple(d.input_ids), tuple(render.labels_of(d, spec.loss_on))) for d in documents]
    assert _pieces(rows) == sorted(expected)
    assert max(len(row["seq_lengths"]) for row in rows) > 1 if spec.packing else len(rows) == len(documents)


def test_figures_are_those_of_the_rows(made: Any):
    store, base, dataset = made
    packed = subject.pack_dataset(dataset, base, PackSpec(row_tokens=200), store)
    rows = _rows(packed, "train")
    num_tokens = sum(len(row["input_ids"]) for row in rows)
    assert packed.num_train_tokens == num_tokens
    assert packed.num_learnt_tokens == sum(label != -100 for row in rows for label in row["labels"])
    assert 0 < packed.num_learnt_tokens < num_tokens
    assert packed.fill_pct == round(100 * num_tokens / (200 * len(rows)), 2)
    assert (packed.num_train_documents, packed.num_validation_documents) == (
        dataset.num_train_rows,
        dataset.num_validation_rows,
    )
    assert packed.parents == (dataset.ref, base.ref)


def test_validation_documents_are_kept_for_the_proof(made: Any):
    store, base, dataset = made
    packed = subject.pack_dataset(dataset, base, PackSpec(row_tokens=200), store)
    probes = pq.read_table(packed.path / "validation_documents.parquet").to_pylist()
    source = pq.read_table(dataset.path / "validation.parquet").to_pylist()
    assert [probe["row_id"] for probe in probes] == [row["row_id"] for row in source]
    for probe, row in zip(probes, source, strict=True):
        question, answer = (message["content"] for message in row["messages"])
        asked = f"<|start|>user<|message|>{question}<|end|><|start|>assistant"
        assert TOKENIZER.decode(probe["prompt_ids"]) == asked
        assert TOKENIZER.decode(probe["answer_ids"]) == f"<|channel|>final<|message|>{answer}<|return|>"


def test_golden_rows(made: Any):
    """Other bytes here mean that VERSION of tasks/pack/run.py has to be raised."""
    store, base, dataset = made
    packed = subject.pack_dataset(dataset, base, PackSpec(row_tokens=200), store)
    text = json.dumps([_rows(packed, "train"), _rows(packed, "validation")], sort_keys=True)
    assert (subject.VERSION, sha256(text.encode()).hexdigest()[:16]) == (2, "b24e7df242f659c3")


def test_second_call_is_skipped(made: Any, caplog: pytest.LogCaptureFixture):
    store, base, dataset = made
    first = subject.pack_dataset(dataset, base, PackSpec(row_tokens=200), store)
    with caplog.at_level("INFO", "tasks.artifacts"):
        assert subject.pack_dataset(dataset, base, PackSpec(row_tokens=200), store) == first
    assert f"skipped: packed/{first.short}" in caplog.text
    assert subject.pack_dataset(dataset, base, PackSpec(row_tokens=201), store).key != first.key


def test_row_over_the_context_is_refused(made: Any):
    store, base, dataset = made
    with pytest.raises(SpecError, match=r"row_tokens = 513 but the base's context is 512 tokens: lower row_tokens"):
        subject.pack_dataset(dataset, base, PackSpec(row_tokens=513), store)


def test_document_over_the_row_is_named_or_dropped(made: Any):
    store, base, dataset = made
    with pytest.raises(
        DataError, match=r"\d+ of \d+ documents are longer than a row: chats\.jsonl:\d+ has \d+ tokens but"
    ):
        subject.pack_dataset(dataset, base, PackSpec(row_tokens=27), store)
    source = pq.read_table(dataset.path / "train.parquet").to_pylist()
    lengths = sorted(d.num_tokens for d in render.render_chats(source, TOKENIZER, PackSpec()))
    capacity = lengths[len(lengths) // 4]
    packed = subject.pack_dataset(dataset, base, PackSpec(row_tokens=capacity, too_long="drop"), store)
    assert packed.num_train_documents == sum(length <= capacity for length in lengths) < len(lengths)
    manifest = store.manifest(PackedDataset, packed.key)
    assert manifest is not None
    assert manifest["about"]["num_dropped"] == sum(length > capacity for length in lengths)
    too_long = {d.row_id for d in render.render_chats(source, TOKENIZER, PackSpec()) if d.num_tokens > capacity}
    assert set(manifest["about"]["dropped_rows"]) == too_long


def test_nothing_left_is_said(made: Any):
    store, base, dataset = made
    with pytest.raises(DataError, match="no train document is left: all are longer than a row of 3 tokens"):
        subject.pack_dataset(dataset, base, PackSpec(row_tokens=3, too_long="drop"), store)


def test_tokenizer_without_a_template_is_refused(made: Any, tmp_path: Path):
    store, _, dataset = made
    base = make_base(store, tmp_path / "plain")
    (tmp_path / "plain/chat_template.jinja").unlink()
    with pytest.raises(SpecError, match=r"has no chat template, so chats can't be rendered: name an instruct model"):
        subject.pack_dataset(dataset, base, PackSpec(row_tokens=200), store)


@pytest.fixture(scope="module")
def texts(made: Any, tmp_path_factory: pytest.TempPathFactory) -> FetchedDataset:
    path = tmp_path_factory.mktemp("texts") / "t.jsonl"
    path.write_text("".join(json.dumps({"t": f"{index} " * (5 + index * 3)}) + "\n" for index in range(30)))
    spec = FetchSpec(source=str(path), text_column="t", validation_pct=20)
    return fetch_dataset(spec, made[0], HfApi(token=False))


def test_long_texts_are_split_over_rows_and_no_token_is_lost(made: Any, texts: FetchedDataset):
    store, base, _ = made
    packed = subject.pack_dataset(texts, base, PackSpec(row_tokens=64), store)
    rows = _rows(packed, "train")
    assert all(len(row["input_ids"]) <= 64 for row in rows)
    assert all(row["labels"] == row["input_ids"] for row in rows)
    source = pq.read_table(texts.path / "train.parquet").to_pylist()
    expected = [token for d in render.render_texts(source, TOKENIZER) for token in d.input_ids]
    assert sorted(token for row in rows for token in row["input_ids"]) == sorted(expected)
    probes = pq.read_table(packed.path / "validation_documents.parquet").to_pylist()
    assert all(len(probe["prompt_ids"]) == 1 for probe in probes)  # nothing stands before the first token: no score
    assert all(1 < len(probe["prompt_ids"]) + len(probe["answer_ids"]) <= 64 for probe in probes)


def test_unpacked_texts_over_the_row_are_refused(made: Any, texts: FetchedDataset):
    store, base, _ = made
    with pytest.raises(DataError, match="documents are longer than a row"):
        subject.pack_dataset(texts, base, PackSpec(row_tokens=64, packing=False), store)


lengths = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 12)), min_size=1, max_size=25)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lengths, st.integers(18, 40))
def test_packing_neither_loses_nor_splits_a_document(sizes: list[tuple[int, int]], capacity: int):
    documents = [
        render.Document(row_id=str(i), prompt_ids=[i] * asked, answer_ids=[1000 + i] * said)
        for i, (asked, said) in enumerate(sizes)
    ]
    columns = subject._pack(documents, True, PackSpec(row_tokens=capacity))
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    assert all(len(row["input_ids"]) <= capacity for row in rows)
    assert _pieces(rows) == sorted((tuple(d.input_ids), tuple(render.labels_of(d, "assistant"))) for d in documents)


def test_memory_does_not_grow_with_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """540 more chats of 450 tokens would be 6 MB of Python objects."""
    monkeypatch.setattr(subject, "_CHUNK_DOCUMENTS", 50)
    monkeypatch.setattr(subject, "_BATCH_ROWS", 20)
    store = ArtifactStore(tmp_path / "home")
    base, peaks = make_base(store, tmp_path / "base"), []
    for count in (60, 600):
        path = tmp_path / f"{count}.jsonl"
        chats = [_chat(f"{index}", "x" * 400) for index in range(count)]
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        dataset = fetch_dataset(FetchSpec(source=str(path), validation_pct=5), store, HfApi(token=False))
        tracemalloc.start()
        try:
            packed = subject.pack_dataset(dataset, base, PackSpec(row_tokens=512), store)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert packed.num_train_documents == dataset.num_train_rows
    assert peaks[1] - peaks[0] < 2 << 20


def _chat(asked: str, answered: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
