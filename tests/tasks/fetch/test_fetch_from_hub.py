"""Bases and data sets from a loopback Hub, through the real clients."""

import json
import logging
import textwrap
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from tasks import files
from tasks.artifacts import ArtifactStore, BaseCheckpoint
from tasks.errors import AccessError, CapacityError, CorruptError, MissingError, TransientError
from tasks.fetch.run import downloaded_bytes, fetch_base
from tasks.specs import BaseModelSpec
from tests.hub_server import (
    NOBODY,
    READ,
    HubServer,
    hub_fixture,  # noqa: F401  (the fixture `hub`)
    run_client,
)
from tests.tasks.publish.conftest import write_model

pytestmark = pytest.mark.long

BASE = "ada/base"
SPEC = BaseModelSpec(model=BASE)
VALUES = {
    "source": "ada/rows",
    "split": "train",
    "validation_split": "test",
    "question_column": "q",
    "answer_column": "a",
}


@pytest.fixture
def model(tmp_path: Path) -> dict[str, bytes]:
    """The files of a small base, with the second copy of the weights that gpt-oss ships."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_model(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """An empty store."""
    return ArtifactStore(tmp_path / "store")


def client(hub: HubServer, token: str | bool = READ) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def downloads(hub: HubServer) -> list[str]:
    return sorted(path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path)


def test_a_base_arrives_whole_at_its_pinned_commit(store: ArtifactStore, hub: HubServer, model: dict[str, bytes]):
    copies = {"original/model.safetensors": b"twice", "metal/model.bin": b"thrice", "picture.png": b"x"}
    copies["consolidated.safetensors"] = copies["consolidated-00001-of-00002.safetensors"] = b"again"
    repo = hub.add_repo("model", BASE, {**model, **copies}, private=True)
    commit = repo.branches["main"]
    base = fetch_base(SPEC, store, client(hub))
    folder = Path(base.model_folder)
    assert {name: (folder / name).read_bytes() for name in files.list_files(folder)} == model
    assert base.origin == f"{BASE}@{commit}" and base.num_parameters == 40_000
    assert base.path in folder.parents
    hub.requests.clear()
    assert fetch_base(SPEC, store, client(hub)) == base
    assert downloads(hub) == []


def test_a_branch_that_moved_on_is_another_base(store: ArtifactStore, hub: HubServer, model: dict[str, bytes]):
    repo = hub.add_repo("model", BASE, model)
    first = repo.branches["main"]
    old = fetch_base(SPEC, store, client(hub))
    hub.add_repo("model", BASE, {"config.json": b'{"model_type": "other"}'})
    new = fetch_base(SPEC, store, client(hub))
    assert old.key != new.key and old.model_digest != new.model_digest
    pinned = fetch_base(BaseModelSpec(model=BASE, revision=first), store, client(hub))
    assert pinned.model_digest == old.model_digest
    assert (Path(pinned.model_folder) / "config.json").read_bytes() == model["config.json"]


def test_two_downloads_of_a_commit_have_one_digest(tmp_path: Path, hub: HubServer, model: dict[str, bytes]):
    hub.add_repo("model", BASE, model)
    digests = {fetch_base(SPEC, ArtifactStore(tmp_path / name), client(hub)).model_digest for name in ("a", "b")}
    assert len(digests) == 1


def test_a_cut_connection_goes_on_inside_the_file(store: ArtifactStore, hub: HubServer, model: dict[str, bytes]):
    hub.add_repo("model", BASE, model)
    shard = "model-00002-of-00002.safetensors"
    rule = hub.fail("GET", f"/resolve/.*/{shard}", status=0, keep_bytes=7_000)
    base = fetch_base(SPEC, store, client(hub))
    assert rule.hits == 1 and downloads(hub).count(shard) == 2
    assert (Path(base.model_folder) / shard).read_bytes() == model[shard]


@pytest.mark.parametrize("status", [503, 0])
def test_an_interrupted_download_goes_on_with_what_is_missing(
    store: ArtifactStore, hub: HubServer, model: dict[str, bytes], status: int
):
    hub.add_repo("model", BASE, model)
    shard = "model-00002-of-00002.safetensors"
    rule = hub.fail("GET", f"/resolve/.*/{shard}", times=1000, status=status)
    with pytest.raises(TransientError, match="base model ada/base@"):
        fetch_base(SPEC, store, client(hub))
    assert store.committed(BaseCheckpoint) == []
    here = {path.name for path in store.root.glob("base/*/model/*") if path.is_file()}
    rule.times = 0
    hub.requests.clear()
    base = fetch_base(SPEC, store, client(hub))
    assert shard in downloads(hub) and not here & set(downloads(hub))
    assert {path.name: path.read_bytes() for path in Path(base.model_folder).iterdir()} == model


@pytest.mark.parametrize("status", [503, 0])
def test_a_hub_that_goes_away_before_the_listing_is_transient(
    store: ArtifactStore, hub: HubServer, model: dict[str, bytes], status: int
):
    hub.add_repo("model", BASE, model)
    rule = hub.fail("GET", "/tree/", times=1000, status=status)
    with pytest.raises(TransientError):
        fetch_base(SPEC, store, client(hub))
    assert store.committed(BaseCheckpoint) == [] and rule.hits


@pytest.mark.parametrize("token", [NOBODY, False])
def test_a_gated_base_is_named(store: ArtifactStore, hub: HubServer, model: dict[str, bytes], token: str | bool):
    hub.add_repo("model", BASE, model, gated=True)
    with pytest.raises(AccessError, match="ada/base@main: the repository is gated"):
        fetch_base(SPEC, store, client(hub, token))
    assert downloads(hub) == []
    assert fetch_base(SPEC, store, client(hub, READ)).num_parameters == 40_000


def test_a_base_that_is_not_there_is_named(store: ArtifactStore, hub: HubServer):
    with pytest.raises(MissingError, match="model ada/none@main: 404"):
        fetch_base(BaseModelSpec(model="ada/none"), store, client(hub))
    hub.add_repo("model", BASE, {"config.json": b"{}"})
    with pytest.raises(MissingError, match="no such revision"):
        fetch_base(BaseModelSpec(model=BASE, revision="v9"), store, client(hub))
    with pytest.raises(MissingError, match=r"has no \.safetensors weights"):
        fetch_base(SPEC, store, client(hub))


def test_a_torn_shard_on_the_hub_is_found(store: ArtifactStore, hub: HubServer, model: dict[str, bytes]):
    shard = "model-00001-of-00002.safetensors"
    hub.add_repo("model", BASE, {**model, shard: model[shard][:-1]})
    with pytest.raises(CorruptError, match=shard):
        fetch_base(SPEC, store, client(hub))
    assert store.committed(BaseCheckpoint) == []


def test_a_disk_that_is_too_small_is_said_before_the_download(
    store: ArtifactStore, hub: HubServer, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    hub.add_repo("model", BASE, {**model, "original/model.safetensors": b"x" * 100_000})
    needed = sum(len(data) for data in model.values())
    monkeypatch.setattr(files, "free_bytes", lambda path: needed - 1)
    with pytest.raises(CapacityError, match="downloading ada/base needs about"):
        fetch_base(SPEC, store, client(hub))
    assert downloads(hub) == []
    monkeypatch.setattr(files, "free_bytes", lambda path: needed)  # the copies are not counted
    assert fetch_base(SPEC, store, client(hub)).num_parameters == 40_000


def test_an_interrupted_download_needs_room_for_the_rest_only(
    store: ArtifactStore, hub: HubServer, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    repo = hub.add_repo("model", BASE, model)
    shard = "model-00002-of-00002.safetensors"
    rule = hub.fail("GET", f"/resolve/.*/{shard}", times=1000, status=503)
    with pytest.raises(TransientError):
        fetch_base(SPEC, store, client(hub))
    here = downloaded_bytes(SPEC, repo.branches["main"], store)
    assert here >= sum(len(data) for name, data in model.items() if name != shard)
    rule.times = 0
    monkeypatch.setattr(files, "free_bytes", lambda path: len(model[shard]))
    assert fetch_base(SPEC, store, client(hub)).num_parameters == 40_000


def test_the_token_is_nowhere(
    store: ArtifactStore, hub: HubServer, model: dict[str, bytes], caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    hub.add_repo("model", BASE, model, private=True)
    fetch_base(SPEC, store, client(hub))
    written = [path.read_bytes() for path in store.root.rglob("*") if path.is_file()]
    assert caplog.records and READ not in caplog.text
    assert written and not [data for data in written if READ.encode() in data]


# `datasets` reads HF_ENDPOINT and the cache folders when it is imported: a process of its own.
_FETCH = """
import json, sys
from huggingface_hub import HfApi, constants
from tasks.artifacts import ArtifactStore
from tasks.fetch.run import fetch_dataset
from tasks.specs import FetchSpec
import pyarrow.parquet as pq
from pathlib import Path

def show(values, token, endpoint=None):
    try:
        store, hub = ArtifactStore(Path(sys.argv[1])), HfApi(endpoint=endpoint, token=token)
        found = fetch_dataset(FetchSpec(**values), store, hub)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    rows = {n: pq.read_table(f"{found.folder}/{n}.parquet").to_pylist() for n in ("train", "validation")}
    return {"revision": found.revision, **rows}
"""


def in_a_process(hub: HubServer, tmp_path: Path, code: str) -> dict:
    """Run `code`, which sets `said`, after the imports above; return `said`."""
    script = _FETCH + textwrap.dedent(code) + "\nprint('SAID' + json.dumps(said))"
    done = run_client(hub, tmp_path / "hf-home", script, str(tmp_path / "store"))
    lines = [line for line in done.stdout.splitlines() if line.startswith("SAID")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("SAID"))


def as_jsonl(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_data_set_by_id_revision_split_and_columns(hub: HubServer, tmp_path: Path):
    rows = [{"q": f"q{i}", "a": f"a{i}", "rest": "-"} for i in range(6)]
    repo = hub.add_repo(
        "dataset", "ada/rows", {"train.jsonl": as_jsonl(rows[:4]), "test.jsonl": as_jsonl(rows[4:])}, private=True
    )
    first = repo.branches["main"]
    hub.add_repo("dataset", "ada/rows", {"train.jsonl": as_jsonl([{"q": "new", "a": "newer", "rest": ""}])})
    second = repo.branches["main"]
    said = in_a_process(
        hub,
        tmp_path,
        f"""
        values, token = {VALUES!r}, {READ!r}
        said = {{
            "first": show({{**values, "revision": {first!r}}}, token),
            "main": show(values, token),
            "split": show({{**values, "split": "nope"}}, token),
            "column": show({{**values, "answer_column": "nope"}}, token),
            "missing": show({{**values, "source": "ada/none"}}, token),
            "anonymous": show(values, False),
            "wrong": show(values, "hf_wrong"),
            "elsewhere": show({{**values, "max_rows": 1}}, token, constants.ENDPOINT.replace("127.0.0.1", "localhost")),
        }}
        """,
    )
    assert said["first"]["revision"] == first
    chats = [[(m["role"], m["content"]) for m in row["messages"]] for row in said["first"]["train"]]
    assert chats == [[("user", f"q{i}"), ("assistant", f"a{i}")] for i in range(4)]
    assert [row["messages"][1]["content"] for row in said["first"]["validation"]] == ["a4", "a5"]
    assert [row["messages"][1]["content"] for row in said["main"]["train"]] == ["newer"]
    assert said["main"]["revision"] == second
    assert said["split"]["error"] == "DataError" and "nope" in said["split"]["message"]
    assert "train" in said["split"]["message"] and "test" in said["split"]["message"]  # what exists
    assert said["column"]["error"] == "DataError" and "nope" in said["column"]["message"]
    assert said["missing"]["error"] == "MissingError" and "404" in said["missing"]["message"]
    assert said["anonymous"]["error"] == "TokenError" and "401" in said["anonymous"]["message"]
    assert said["wrong"]["error"] == "TokenError" and "401, the token is wrong" in said["wrong"]["message"]
    assert said["elsewhere"]["error"] == "SpecError" and "set HF_ENDPOINT" in said["elsewhere"]["message"]


def test_the_first_rows_come_without_the_rest(hub: HubServer, tmp_path: Path):
    rows = [
        {"q": f"q{i}", "a": f"a{i} " + "x" * 1000} for i in range(12_000)
    ]  # 12 MB: more than datasets reads at once
    hub.add_repo("dataset", "ada/rows", {"train.jsonl": as_jsonl(rows), "test.jsonl": as_jsonl(rows[:9])}, private=True)
    said = in_a_process(hub, tmp_path, f"""
        values = {VALUES!r}
        said = {{
            "some": show({{**values, "max_rows": 5}}, {READ!r}),
            "split": show({{**values, "max_rows": 5, "split": "nope"}}, {READ!r}),
            "anonymous": show({{**values, "max_rows": 5}}, False),
        }}
        """)  # fmt: skip
    assert [row["messages"][1]["content"][:3] for row in said["some"]["train"]] == [f"a{i} " for i in range(5)]
    assert len(said["some"]["validation"]) == 5
    assert said["split"]["error"] == "DataError" and "test" in said["split"]["message"]
    assert said["anonymous"]["error"] == "TokenError" and "401" in said["anonymous"]["message"]
    assert not list((tmp_path / "hf-home" / "datasets").rglob("*.arrow"))


def test_a_failing_hub_never_yields_another_revisions_rows(hub: HubServer, tmp_path: Path):
    """datasets answers from its cache when the Hub fails, whatever revision that is."""
    held = as_jsonl([{"q": "q", "a": "held out"}])
    hub.add_repo("dataset", "ada/rows", {"train.jsonl": as_jsonl([{"q": "q", "a": "old"}]), "test.jsonl": held})
    fetch = f"said = show({VALUES!r}, {READ!r})"
    old = in_a_process(hub, tmp_path, fetch)
    assert old["train"][0]["messages"][1]["content"] == "old"
    hub.add_repo("dataset", "ada/rows", {"train.jsonl": as_jsonl([{"q": "q", "a": "new"}])})
    rules = [
        hub.fail(method, "/(resolve|tree|paths-info)/", times=1000, status=403) for method in ("GET", "HEAD", "POST")
    ]
    failed = in_a_process(hub, tmp_path, fetch)
    assert "train" not in failed and failed["error"] in {"TransientError", "RightsError"}, failed
    for rule in rules:
        rule.times = 0
    new = in_a_process(hub, tmp_path, fetch)
    assert new["train"][0]["messages"][1]["content"] == "new" and new["revision"] != old["revision"]


def test_a_base_may_lie_elsewhere_and_comes_again_when_that_disk_is_gone(
    store: ArtifactStore, hub: HubServer, model: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Colab: TATARA_HOME is on Drive, the base on the machine's own disk, which the next session does not have."""
    hub.add_repo("model", BASE, model)
    monkeypatch.setenv("TATARA_MODELS", str(tmp_path / "models"))
    first = fetch_base(SPEC, store, client(hub))
    folder = Path(first.model_folder)
    assert tmp_path / "models" in folder.parents and not list(store.root.rglob("*.safetensors"))
    assert downloaded_bytes(SPEC, first.origin.rpartition("@")[2], store) == sum(map(len, model.values()))
    hub.requests.clear()
    assert fetch_base(SPEC, store, client(hub)) == first and downloads(hub) == []
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(b"half")  # a session that was cut in its download
    assert fetch_base(SPEC, store, client(hub)) == first
    assert shard.read_bytes() == model[shard.name]
    monkeypatch.setenv("TATARA_MODELS", str(tmp_path / "another machine"))
    again = fetch_base(SPEC, store, client(hub))
    assert (again.key, again.model_digest) == (first.key, first.model_digest)
    assert {path.name: path.read_bytes() for path in Path(again.model_folder).iterdir()} == model


def test_a_column_that_is_not_there_is_said_before_the_download(hub: HubServer, tmp_path: Path):
    card = "---\ndataset_info:\n  features:\n  - name: q\n    dtype: string\n  - name: a\n    dtype: string\n---\n"
    rows = as_jsonl([{"q": "q", "a": "a"}])
    hub.add_repo("dataset", "ada/rows", {"README.md": card.encode(), "train.jsonl": rows, "test.jsonl": rows})
    values = {"source": "ada/rows", "text_column": "qq"}
    said = in_a_process(hub, tmp_path, f"said = show({values!r}, {READ!r})")
    assert said["error"] == "DataError" and "has no column 'qq': did you mean q? It has q, a" in said["message"]
    assert not [path for method, path in hub.requests if method == "GET" and path.endswith(".jsonl")]
