"""Files of each kind become parquet rows; what can't be used is named with its line."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi

from tasks.artifacts import ArtifactStore, FetchedDataset
from tasks.errors import CorruptError, DataError, MissingError
from tasks.fetch import run as subject
from tasks.specs import BaseModelSpec, FetchSpec
from tests.tiny import save_model, write_chats

HUB = HfApi(token=False)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "home")


def _rows(dataset: FetchedDataset, split: str) -> list[dict[str, Any]]:
    return pq.read_table(dataset.path / f"{split}.parquet").to_pylist()


def _chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


PAIRS = [("節分とは？", "二月の行事です。\n豆をまきます。"), ("q2, with a comma", 'an "answer"'), ("三", "3")]


def _write(path: Path) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as handle:  # as spreadsheets write it
            csv.writer(handle).writerows([("q", "a"), *PAIRS])
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"q": [q for q, _ in PAIRS], "a": [a for _, a in PAIRS]}), path)
    else:
        _jsonl(path, *[{"q": q, "a": a} for q, a in PAIRS])
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_each_kind_of_file_gives_the_same_chats(tmp_path: Path, store: ArtifactStore, suffix: str):
    held_out = _jsonl(tmp_path / "v.jsonl", {"q": "v?", "a": "v"})
    spec = FetchSpec(
        source=str(_write(tmp_path / f"data{suffix}")),
        validation_source=str(held_out),
        question_column="q",
        answer_column="a",
    )
    made = subject.fetch_dataset(spec, store, HUB)
    assert [row["messages"] for row in _rows(made, "train")] == [_chat(q, a) for q, a in PAIRS]
    assert _rows(made, "validation") == [{"row_id": "v.jsonl:1", "messages": _chat("v?", "v")}]
    assert (made.num_train_rows, made.num_validation_rows, made.num_rejected_rows, made.is_chat) == (3, 1, 0, True)
    names = {".jsonl": [1, 2, 3], ".csv": [3, 4, 5], ".parquet": [1, 2, 3]}[suffix]  # a CSV row may span lines
    assert [row["row_id"] for row in _rows(made, "train")] == [f"data{suffix}:{number}" for number in names]


def test_parquet_rows_are_numbered_through_all_batches(tmp_path: Path, store: ArtifactStore):
    count = 70_000  # pyarrow reads 65,536 rows at once
    pq.write_table(pa.table({"t": [f"text {index}" for index in range(count)]}), tmp_path / "x.parquet")
    found = list(subject._read_file(tmp_path / "x.parquet"))
    assert [where for where, _ in found] == [f"x.parquet:{number}" for number in range(1, count + 1)]
    assert found[-1][1] == {"t": "text 69999"}


def test_plain_text(tmp_path: Path, store: ArtifactStore):
    source = _jsonl(tmp_path / "t.jsonl", *[{"body": f"text {index}"} for index in range(40)])
    made = subject.fetch_dataset(FetchSpec(source=str(source), text_column="body", validation_pct=30), store, HUB)
    assert made.is_chat is False
    texts = [row["text"] for split in ("train", "validation") for row in _rows(made, split)]
    assert sorted(texts) == sorted(f"text {index}" for index in range(40))


def test_bad_rows_are_named_with_file_and_line(tmp_path: Path, store: ArtifactStore):
    good = {"messages": _chat("q", "a")}
    source = _jsonl(tmp_path / "d.jsonl", good, {"messages": _chat("q", "")}, good, {"messages": _chat("x", "y")[:1]})
    with pytest.raises(
        DataError,
        match=r"d\.jsonl: 2 of 4 rows can't be used \(d\.jsonl:2: message 1 is empty; d\.jsonl:4: the chat has no .*"
        r"\): mend them, or raise FetchSpec\.max_rejected_pct \(now 0\)",
    ):
        subject.fetch_dataset(FetchSpec(source=str(source)), store, HUB)
    assert store.committed(FetchedDataset) == []


def test_tolerated_bad_rows_are_kept_aside_with_reasons(tmp_path: Path, store: ArtifactStore):
    rows = [{"messages": _chat(f"q{index}", "a")} for index in range(30)]
    source = _jsonl(tmp_path / "d.jsonl", *rows, {"messages": "no list"}, [1, 2])
    spec = FetchSpec(source=str(source), max_rejected_pct=10, validation_pct=30)
    made = subject.fetch_dataset(spec, store, HUB)
    rejected = [json.loads(line) for line in (made.path / "rejected.jsonl").read_text().splitlines()]
    assert rejected == [
        {"split": "train", "row_id": "d.jsonl:31", "reason": "messages is not a list of {role, content}"},
        {"split": "train", "row_id": "d.jsonl:32", "reason": "no column 'messages'; the row has value"},
    ]
    assert (made.num_rejected_rows, made.num_train_rows + made.num_validation_rows) == (2, 30)


def _torn_jsonl(path: Path) -> Path:
    _jsonl(path, {"messages": _chat("q", "a")}, {"messages": _chat("q", "a")})
    path.write_bytes(path.read_bytes()[:-20])
    return path


def _latin1_jsonl(path: Path) -> Path:
    path.write_bytes('{"messages": "é"}\n'.encode("latin-1"))
    return path


def _torn_parquet(path: Path) -> Path:
    pq.write_table(pa.table({"messages": ["x"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-50])
    return path


def _huge_csv(path: Path) -> Path:
    path.write_text("messages\n" + "x" * 200_000 + "\n")
    return path


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("d.jsonl", _torn_jsonl, r"d\.jsonl:2 is not JSON \(.*\): mend or delete that line"),
        ("d.jsonl", _latin1_jsonl, r"d\.jsonl is not UTF-8 \(.*\): convert it"),
        ("d.csv", _latin1_jsonl, r"d\.csv is not UTF-8"),
        ("d.parquet", _torn_parquet, r"d\.parquet is no whole parquet file \(.*\): download or make it again"),
        ("d.csv", _huge_csv, r"d\.csv is no CSV \(field larger"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, store: ArtifactStore, name: str, write: Any, message: str):
    with pytest.raises(CorruptError, match=message):
        subject.fetch_dataset(FetchSpec(source=str(write(tmp_path / name))), store, HUB)


def test_missing_empty_and_one_sided_data(tmp_path: Path, store: ArtifactStore):
    with pytest.raises(MissingError, match=r"data file .*nowhere\.jsonl is not there \(working directory .*FetchSpec"):
        subject.fetch_dataset(FetchSpec(source=str(tmp_path / "nowhere.jsonl")), store, HUB)
    for text in ("", "\n \n"):
        (tmp_path / "empty.jsonl").write_text(text)
        with pytest.raises(DataError, match=r"empty\.jsonl is empty: expected at least one row"):
            subject.fetch_dataset(FetchSpec(source=str(tmp_path / "empty.jsonl")), store, HUB)
    few = write_chats(tmp_path / "few.jsonl", 2)
    with pytest.raises(DataError, match=r"has no validation rows \(2 in all\): add rows, name FetchSpec\.validation_s"):
        subject.fetch_dataset(FetchSpec(source=str(few), validation_pct=0), store, HUB)


def test_missing_column_is_named_with_those_that_exist(tmp_path: Path, store: ArtifactStore):
    source = _write(tmp_path / "data.csv")
    with pytest.raises(DataError, match=r"data\.csv:3: no column 'question'; the row has q, a"):
        subject.fetch_dataset(FetchSpec(source=str(source), question_column="question", answer_column="a"), store, HUB)


def _split_of(path: Path, store: ArtifactStore) -> dict[str, str]:
    made = subject.fetch_dataset(FetchSpec(source=str(path), validation_pct=30), store, HUB)
    return {row["messages"][0]["content"]: split for split in ("train", "validation") for row in _rows(made, split)}


def test_split_is_fixed_and_stays_when_rows_are_added_or_moved(tmp_path: Path, store: ArtifactStore):
    before = _split_of(write_chats(tmp_path / "a.jsonl", 60), store)
    assert set(before.values()) == {"train", "validation"}
    after = _split_of(write_chats(tmp_path / "b.jsonl", 90), store)
    assert {question: after[question] for question in before} == before
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "c.jsonl").write_text("".join(reversed(lines)))
    assert _split_of(tmp_path / "c.jsonl", store) == before


def test_golden_split(tmp_path: Path, store: ArtifactStore):
    """Another answer here means that VERSION of tasks/fetch/run.py has to be raised."""
    split = _split_of(write_chats(tmp_path / "a.jsonl", 12), store)
    assert (subject.VERSION, [question for question, side in split.items() if side == "validation"]) == (1, ["q8?"])


def test_max_rows(tmp_path: Path, store: ArtifactStore):
    spec = FetchSpec(source=str(write_chats(tmp_path / "a.jsonl", 60)), max_rows=20, validation_pct=30)
    made = subject.fetch_dataset(spec, store, HUB)
    assert made.num_train_rows + made.num_validation_rows == 20


def test_second_call_is_skipped_and_an_edited_file_is_a_new_artifact(
    tmp_path: Path, store: ArtifactStore, caplog: pytest.LogCaptureFixture
):
    path = write_chats(tmp_path / "a.jsonl", 60)
    spec = FetchSpec(source=str(path), validation_pct=30)
    first = subject.fetch_dataset(spec, store, HUB)
    written = (first.path / "train.parquet").stat().st_mtime_ns
    with caplog.at_level("INFO", "tasks.artifacts"):
        assert subject.fetch_dataset(spec, store, HUB) == first
    assert f"skipped: dataset/{first.short} is already whole at {first.folder}" in caplog.text
    assert (first.path / "train.parquet").stat().st_mtime_ns == written
    path.write_text(path.read_text().replace("answer 0", "answer zero", 1))
    second = subject.fetch_dataset(spec, store, HUB)
    assert second.key != first.key
    assert len(store.committed(FetchedDataset)) == 2


def test_shipped_data_has_its_own_split(store: ArtifactStore):
    made = subject.fetch_dataset(FetchSpec(source="shipped"), store, HUB)
    lines = [len((subject.SHIPPED / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "validation")]
    assert [made.num_train_rows, made.num_validation_rows] == lines
    assert made.num_rejected_rows == 0


def test_local_base_is_used_where_it_lies_and_counted(tmp_path: Path, store: ArtifactStore):
    folder = save_model(tmp_path / "base")
    spec = BaseModelSpec(model=str(folder))
    base = subject.fetch_base(spec, store, HUB)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (base.model_folder, base.num_parameters) == (str(folder), model.num_parameters())
    assert subject.fetch_base(spec, store, HUB) == base
    save_model(folder, seed=1)
    assert subject.fetch_base(spec, store, HUB).model_digest != base.model_digest


def test_base_that_is_not_whole_is_refused(tmp_path: Path, store: ArtifactStore):
    folder = save_model(tmp_path / "base")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=r"model\.safetensors has \d+ bytes but its header describes \d+"):
        subject.fetch_base(BaseModelSpec(model=str(folder)), store, HUB)
    weights.unlink()
    with pytest.raises(MissingError, match=r"base has no \.safetensors weights"):
        subject.fetch_base(BaseModelSpec(model=str(folder)), store, HUB)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MissingError, match=r"lacks model-00001-of-00002\.safetensors that its index names"):
        subject.fetch_base(BaseModelSpec(model=str(folder)), store, HUB)
    with pytest.raises(
        MissingError, match=r"nowhere has no config\.json: name a Hub id or a transformers model folder"
    ):
        subject.fetch_base(BaseModelSpec(model=str(tmp_path / "nowhere")), store, HUB)
