"""Files of each kind become parquet rows; what can't be used is named with its line."""

import csv
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from tasks import files
from tasks.artifacts import ArtifactStore, BaseCheckpoint, FetchedDataset
from tasks.errors import CorruptError, DataError, MissingError, SpecError, TransientError
from tasks.fetch import report, sources
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
    spec = FetchSpec(source=str(tmp_path / "x.parquet"), text_column="t", validation_pct=0)
    found = list(sources.read_rows(spec, HUB, {"source": ""}))
    assert [read.row_id for read in found] == [f"x.parquet:{number}" for number in range(1, count + 1)]
    assert found[-1].row == {"text": "text 69999"}


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


def test_csv_rows_of_another_length_than_the_header_are_no_rows(tmp_path: Path, store: ArtifactStore):
    good = "".join(f"q{index},a{index}\n" for index in range(40))
    (tmp_path / "d.csv").write_text(f"q,a\n{good}why,because, of course\n\nonly a question\n")
    spec = FetchSpec(source=str(tmp_path / "d.csv"), question_column="q", answer_column="a", validation_pct=30)
    with pytest.raises(DataError, match=r"2 of 42 rows .*d\.csv:42: it has 3 fields but the header names 2: quote .*"
                       r"d\.csv:44: it has 1 fields but"):  # fmt: skip
        subject.fetch_dataset(spec, store, HUB)
    made = subject.fetch_dataset(spec.model_copy(update={"max_rejected_pct": 10.0}), store, HUB)
    answers = [row["messages"][1]["content"] for split in ("train", "validation") for row in _rows(made, split)]
    assert sorted(answers) == sorted(f"a{index}" for index in range(40))
    manifest = store.manifest(FetchedDataset, made.key)
    assert manifest and sum(manifest["about"]["statistics"]["rejected"].values()) == made.num_rejected_rows == 2


def test_a_csv_column_that_is_named_twice_is_refused(tmp_path: Path, store: ArtifactStore):
    (tmp_path / "d.csv").write_text("q,a,a\n1,2,3\n")
    with pytest.raises(CorruptError, match=r"d\.csv: its header names 'a' twice: rename one"):
        spec = FetchSpec(source=str(tmp_path / "d.csv"), question_column="q", answer_column="a")
        subject.fetch_dataset(spec, store, HUB)


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


@pytest.mark.parametrize(
    ("values", "cls", "message"),
    [
        (
            {"source": "{here}"},
            SpecError,
            r"FetchSpec\.source = .* is a folder, expected one .* \(it holds: a\.jsonl\)",
        ),
        (
            {"source": "data.json"},
            SpecError,
            r"FetchSpec\.source = data\.json: \.json files are not read, expected one",
        ),
        ({"source": "{here}/x.tsv"}, SpecError, r"x\.tsv: \.tsv files are not read"),
        (
            {"source": "a/b/c"},
            SpecError,
            r"dataset a/b/c@main: that is no name of a Hub repository, expected owner/name",
        ),
        (
            {"source": "{here}/a.jsonl", "validation_source": "{here}/no.jsonl"},
            MissingError,
            r"no\.jsonl is not there \(.*\): check FetchSpec\.validation_source$",
        ),
        (
            {"source": "no.csv", "validation_source": "{here}"},
            SpecError,
            r"no\.csv is not there .*check FetchSpec\.source \| FetchSpec\.validation_source = .* is a folder",
        ),
        (
            {"source": "shipped", "validation_source": "{here}/a.jsonl"},
            SpecError,
            r"validation_source = .*a\.jsonl goes with a file, but FetchSpec\.source = shipped",
        ),
        ({"source": "ada/rows", "validation_source": "v.csv"}, SpecError, r"use validation_split for a Hub data set"),
    ],
)
def test_names_that_are_no_source_are_told(
    tmp_path: Path, store: ArtifactStore, values: dict[str, str], cls: type[Exception], message: str
):
    write_chats(tmp_path / "a.jsonl", 3)
    spec = FetchSpec(**{name: value.format(here=tmp_path) for name, value in values.items()})
    with pytest.raises(cls, match=message):
        subject.fetch_dataset(spec, store, HUB)
    assert not (store.root / "dataset").exists()


def test_a_file_that_is_edited_while_it_is_read_is_no_artifact(
    tmp_path: Path, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
):
    path = write_chats(tmp_path / "a.jsonl", 60)
    spec, read_rows = FetchSpec(source=str(path), validation_pct=30), subject.read_rows

    def read_while_it_grows(*asked: Any) -> Any:
        yield from read_rows(*asked)
        write_chats(path, 61)

    monkeypatch.setattr(subject, "read_rows", read_while_it_grows)
    with pytest.raises(TransientError, match=r"a\.jsonl changed while it was read: it is read again"):
        subject.fetch_dataset(spec, store, HUB)
    assert store.committed(FetchedDataset) == []
    assert not list(store.root.rglob("*.parquet")) and not list(store.root.rglob("*.tmp"))
    monkeypatch.undo()
    assert subject.fetch_dataset(spec, store, HUB).num_train_rows > 0


def test_reading_holds_one_row_at_a_time(tmp_path: Path, store: ArtifactStore):
    """20,000 rows of 1 kB: 20 MB as text, more as Python objects."""
    path = tmp_path / "long.jsonl"
    with path.open("w") as handle:
        for index in range(20_000):
            handle.write(json.dumps({"t": f"{index} " + "x" * 1000}) + "\n")
    spec = FetchSpec(source=str(path), text_column="t")
    tracemalloc.start()
    try:
        said = subject.survey_dataset(spec, HUB)
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
        tracemalloc.reset_peak()
        made = subject.fetch_dataset(spec, store, HUB)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
    assert said.endswith(f", {made.num_train_rows} train and {made.num_validation_rows} validation rows")
    assert made.num_train_rows + made.num_validation_rows == 20_000


def test_statistics_are_those_of_the_rows(tmp_path: Path, store: ArtifactStore):
    chats = [{"messages": [{"role": "system", "content": "s"}, *_chat("q" * 9, str(index)), *_chat("r", "b")]}
             for index in range(10, 40)]  # fmt: skip
    path = _jsonl(tmp_path / "d.jsonl", *chats, {"messages": _chat("q", "a" * 500)}, {"messages": "x|y"})
    made = subject.fetch_dataset(FetchSpec(source=str(path), validation_pct=30, max_rejected_pct=50), store, HUB)
    about = (store.manifest(FetchedDataset, made.key) or {})["about"]
    found = about["statistics"]
    assert found["roles"] == {"user": 61, "assistant": 61, "system": 30}
    assert found["turns"] == {"1": 1, "2": 30}
    assert found["characters"] == {"total": 30 * 14 + 501, "median": 14, "longest": 501}
    assert found["sample"] == {"row_id": "d.jsonl:1", **chats[0]}
    shown = report.data_markdown(made, about)
    assert "user 61, assistant 61, system 30" in shown and "30 with 2" in shown and "the longest 501" in shown
    assert "- 1: messages is not a list of {role, content}" in shown and f"user: {'q' * 9}\nassistant: 10" in shown


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
    lines = [len((sources.SHIPPED / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "validation")]
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


def test_weights_that_a_folder_holds_twice_count_once(tmp_path: Path, store: ArtifactStore):
    """Mistral ships consolidated.safetensors beside the shards of its index."""
    plain, twice = save_model(tmp_path / "plain", shard_size="60KB"), save_model(tmp_path / "twice", shard_size="60KB")
    assert len(files.weight_files(twice)) > 1
    (twice / "consolidated.safetensors").write_bytes(files.weight_files(twice)[0].read_bytes())
    expected, found = (subject.fetch_base(BaseModelSpec(model=str(folder)), store, HUB) for folder in (plain, twice))
    assert (found.num_parameters, found.model_digest) == (expected.num_parameters, expected.model_digest)
    (twice / "model.safetensors.index.json").unlink()
    with pytest.raises(
        MissingError, match=r"twice has \d+ safetensors files but no model\.safetensors\.index\.json that"
    ):
        subject.fetch_base(BaseModelSpec(model=str(twice)), store, HUB)


def test_a_byte_of_mxfp4_holds_two_parameters(tmp_path: Path, store: ArtifactStore):
    folder = save_model(tmp_path / "base")
    expected = subject.count_parameters(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.down_proj", "experts.gate_up_proj"))]:
        experts, width, out = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.zeros(experts, out, width // 32, 16, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.zeros(experts, out, width // 32, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    base = subject.fetch_base(BaseModelSpec(model=str(folder)), store, HUB)
    assert base.num_parameters == expected
    about = (store.manifest(BaseCheckpoint, base.key) or {})["about"]
    assert f"{expected:,} parameters" in report.base_markdown(base, about)
    assert about["sizes"] == files.list_files(folder)
