"""What strangers, kills and removals leave in a remote is never taken for an artifact, and always said."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from tasks import files
from tasks.artifacts import ArtifactStore, BaseCheckpoint, FetchedDataset, TrainedAdapter
from tasks.errors import CorruptError, SpecError
from tasks.remote import Remote
from tests.tasks.test_artifacts import KEY, Knobs, _commit, _dataset, _make_rows
from tests.tasks.test_remote import ADAPTER_KEY, BASE_KEY, ROOT, _commit_adapter, _commit_base, _machine

OTHER = "12" * 32


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/bucket"


@pytest.fixture
def told(tmp_path: Path, url: str) -> Path:
    """The manifest, there, of an artifact that machine a made."""
    _commit(_machine(tmp_path, "a", url))
    return tmp_path / f"bucket/dataset/{KEY[:16]}/manifest.json"


def _rows(store: ArtifactStore) -> str:
    return (store.folder(FetchedDataset, KEY) / "train.parquet").read_text()


def _rename(name: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for part in ("files", "digests"):
            manifest[part][name] = manifest[part].pop("train.parquet")

    return change


@pytest.mark.parametrize(
    "change",
    [
        _rename("../../../escaped"),
        _rename("/tmp/tatara-escaped"),
        _rename("a/./b"),
        _rename("manifest.json"),
        _rename("deep"),  # and deep/validation.parquet
        _rename("nul\0"),
        lambda manifest: manifest["digests"].pop("train.parquet"),
        lambda manifest: manifest["digests"].update({"train.parquet": 7}),
        lambda manifest: manifest["files"].update({"train.parquet": "4"}),
        lambda manifest: manifest["files"].update({"train.parquet": 3}),
        lambda manifest: manifest["artifact"].update({"key": OTHER}),
        lambda manifest: manifest["artifact"].update({"key": KEY[:16] + OTHER[16:]}),
        lambda manifest: manifest["artifact"].update({"model_folder": ["x"]}),
        lambda manifest: manifest["artifact"].update({"of_a_newer_version": 1}),
        lambda manifest: manifest["artifact"].pop("source"),
        lambda manifest: manifest.update({"kind": "corpus"}),
        lambda manifest: manifest.update({"aside": "../../packed/x"}),
        lambda manifest: manifest.update({"root": None}),
        lambda manifest: manifest.pop("created_at"),
        lambda manifest: manifest.update({"files": []}),
    ],
)
def test_a_manifest_that_does_not_fit_is_said_and_changes_nothing_here(
    tmp_path: Path, url: str, told: Path, change: Callable[[dict[str, Any]], None]
):
    manifest = json.loads(told.read_text())
    change(manifest)
    told.write_text(json.dumps(manifest))
    there = _machine(tmp_path, "b", url)
    with (
        pytest.raises(CorruptError, match=rf"remove {url}/dataset/{KEY[:16]}/ whole"),
        there.claim(FetchedDataset, KEY),
    ):
        pass
    assert not there.folder(FetchedDataset, KEY).exists()
    assert not list(tmp_path.rglob("*escaped*")) and not Path("/tmp/tatara-escaped").exists()


@pytest.mark.parametrize("text", ["", "null", "[]", '"x"', "7", '{"artifact": 1}', "[" * 100_000])
def test_anything_else_in_its_place_is_said_too(tmp_path: Path, url: str, told: Path, text: str):
    told.write_text(text)
    with pytest.raises(CorruptError, match="is not a manifest of ours"):
        _machine(tmp_path, "b", url).known(FetchedDataset)


def test_what_was_removed_there_is_sent_again_by_who_has_it(tmp_path: Path, url: str, told: Path):
    """The way out that the messages name, on the machine that made it; also when a file there has gone bad."""
    (stored,) = told.parent.rglob("validation.parquet")
    stored.write_text("raw")
    with pytest.raises(CorruptError), _machine(tmp_path, "b", url).claim(FetchedDataset, KEY):
        pass
    shutil.rmtree(told.parent)
    with _machine(tmp_path, "a", url).claim(FetchedDataset, KEY):
        pass
    with _machine(tmp_path, "b", url).claim(FetchedDataset, KEY) as claim:
        assert claim.found and (claim.folder / "deep/validation.parquet").read_text() == "row"


def test_who_sent_first_takes_over_what_was_made_there_since(tmp_path: Path, url: str):
    """Also what heals two machines that a store without conditional writes let both be the first."""
    here, there = _machine(tmp_path, "a", url), _machine(tmp_path, "b", url)
    _make_rows(here, "rows of a")
    shutil.rmtree(tmp_path / "bucket")
    _make_rows(there, "rows of b")
    assert _make_rows(here, "").source == "rows of b"
    assert _rows(here) == _rows(there) == "rows of b"


class Plain(MemoryFileSystem):
    """A store whose package knows no `mode`, as ossfs: its `pipe_file` hands it on to a call that has none."""

    protocol = "oss"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("oss://").strip("/")

    def pipe_file(self, path: str, value: bytes) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().pipe_file(path, value)


def test_a_package_without_a_first_write_works_and_never_writes_over_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(_registry, "oss", Plain)
    monkeypatch.setattr(Plain, "store", {})
    caplog.set_level("INFO")
    here, there = (_machine(tmp_path, name, "oss://furnace/team") for name in "ab")
    _make_rows(here, "rows of a")
    assert "knows no write that must be the first" in caplog.text and "mode" in caplog.text
    told = Plain().cat_file(f"/furnace/team/dataset/{KEY[:16]}/manifest.json")
    assert _make_rows(there, "").source == "rows of a"
    late = Remote("oss://furnace/team")
    late._announce(f"dataset/{KEY[:16]}", b"another machine's, in the same moment")
    assert Plain().cat_file(f"/furnace/team/dataset/{KEY[:16]}/manifest.json") == told


def test_what_is_made_anew_in_a_folder_that_was_sent_is_compared_again(tmp_path: Path, url: str):
    here = _machine(tmp_path, "a", url)
    with here.claim(FetchedDataset, KEY) as claim:
        files.write_text(claim.folder / "train.parquet", "old")
        claim.commit(_dataset(KEY, claim.folder), spec=Knobs())
        files.write_text(claim.folder / "train.parquet", "new")
        claim.commit(_dataset(KEY, claim.folder), spec=Knobs())  # as a step whose answer is stale does
    assert _rows(here) == "old"


def test_what_another_version_made_does_not_take_the_place_of_ours(tmp_path: Path, url: str):
    """It can't be read here: the artifact that was made stays whole, and is not mixed with it."""
    here, there = _machine(tmp_path, "a", url), _machine(tmp_path, "b", url)
    with there.claim(FetchedDataset, KEY) as claim:
        _make_rows(here, "rows of a")
        (told,) = (tmp_path / "bucket").rglob("manifest.json")
        manifest = json.loads(told.read_text())
        manifest["artifact"]["of_a_newer_version"] = 1
        told.write_text(json.dumps(manifest))
        files.write_text(claim.folder / "train.parquet", "rows of b")
        with pytest.raises(CorruptError, match="run the same version on each machine"):
            claim.commit(_dataset(KEY, claim.folder), spec=Knobs())
    assert _rows(there) == "rows of b"
    assert there.find(FetchedDataset, KEY)


def test_a_base_whose_model_is_only_on_the_first_machine_leaves_ours_as_it_is(tmp_path: Path, url: str):
    _commit_base(_machine(tmp_path, "a", url), tmp_path / "models/m")
    (tmp_path / "models").rename(tmp_path / "of a alone")
    there = _machine(tmp_path, "b", url)
    made = _commit_base(there)
    assert made.model_folder == f"{there.root}/base/{BASE_KEY[:16]}/model"
    with there.claim(BaseCheckpoint, BASE_KEY) as claim:
        assert claim.found == made
    assert there.known(BaseCheckpoint) == [made]
    assert files.read_json(made.path / "remote.json")["url"] == url  # and 40 GB are not digested at each step


@pytest.mark.parametrize("left", ["damaged", "arriving"])
def test_what_a_kill_left_beside_a_whole_one_is_not_a_second_one_and_goes(tmp_path: Path, url: str, left: str):
    store = _machine(tmp_path, "a", url)
    made = _commit_adapter(store)
    beside = made.path.with_name(f".{made.path.name}.{left}")
    shutil.copytree(made.path, beside)
    chosen = store.choose(TrainedAdapter, ADAPTER_KEY[:8])
    assert chosen == made
    assert store.known(TrainedAdapter) == [made]
    with store.claim(TrainedAdapter, ADAPTER_KEY) as claim:
        assert claim.found == made
    assert not beside.exists()


_KILLED = """
import os, signal, sys
from pathlib import Path
from tasks import artifacts, files
from tasks.remote import Remote
from tests.tasks.test_remote_hostile import _make_rows
point, root, url = sys.argv[1:]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def before(owner, name, when=lambda *args: True):
    real = getattr(owner, name)
    setattr(owner, name, lambda *args, **kw: die() if when(*args) else real(*args, **kw))
if point == "file": before(files, "fsync_file", lambda path: ".arriving" in str(path))
if point == "manifest": before(files, "write_json", lambda path, _: path.name != "remote.json")
if point == "install": before(artifacts, "_put_in_place")
if point == "between": before(Path, "rename", lambda path, _: path.name.endswith(".arriving"))
if point == "after": before(files, "fsync_folder", lambda path: (path / ".abababababababab.damaged").exists())
_make_rows(artifacts.ArtifactStore(Path(root), Remote(url)), "rows of b")
"""


@pytest.mark.parametrize("point", ["file", "manifest", "install", "between", "after"])
@pytest.mark.parametrize("had", [False, True], ids=["crashed before", "made its own"])
def test_a_receiver_that_is_killed_anywhere_has_all_or_nothing(tmp_path: Path, url: str, point: str, had: bool):
    """Both ways a folder is replaced: what a crash left, and what lost the race."""
    there = _machine(tmp_path, "b", url)
    if had:
        _make_rows(ArtifactStore(tmp_path / "b"), "rows of b")
    else:
        files.write_text(there.folder(FetchedDataset, KEY) / "train.parquet", "torn rows of b")
    _make_rows(_machine(tmp_path, "a", url), "rows of a")
    argv = [sys.executable, "-c", _KILLED, point, str(tmp_path / "b"), url]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = there.find(FetchedDataset, KEY)
    assert found is None or _rows(there) == found.source
    assert len(there.committed(FetchedDataset)) == (found is not None)
    assert _make_rows(there, "rows of c").source == _rows(there) == "rows of a"
    assert not list(there.root.glob("dataset/.*.damaged")) and not list(there.root.glob("dataset/.*.arriving"))


def test_room_is_asked_for_what_is_still_to_come(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    rows = "r" * (1 << 20)
    _make_rows(_machine(tmp_path, "a", url), rows)
    files.write_text(tmp_path / "b/dataset" / f".{KEY[:16]}.arriving/train.parquet", rows)
    monkeypatch.setattr(files, "free_bytes", lambda path: 1 << 16)
    assert _make_rows(_machine(tmp_path, "b", url), "").source == rows


@pytest.mark.parametrize("name", ["tea time", "鉄 炉", "a#b%20c", "émile&co+1"])
def test_folders_and_files_may_be_called_anything(tmp_path: Path, name: str):
    url = f"file://{tmp_path}/{name}"
    here, there = _machine(tmp_path, f"{name}/a", url), _machine(tmp_path, f"{name} b", url)
    with here.claim(FetchedDataset, KEY) as claim:
        for number in range(3):
            files.write_text(claim.folder / f"{name}{number}?*[x]/{name}", "rows")
        claim.commit(_dataset(KEY, claim.folder), spec=Knobs())
    with there.claim(FetchedDataset, KEY) as claim:
        assert claim.found and len(list(claim.folder.rglob(name))) == 3


@pytest.mark.parametrize("url", ["ada:verysecret@host/x", "s3:/ada:verysecret@host", "//ada:verysecret@host/x"])
def test_a_password_in_what_is_no_url_is_not_shown(url: str):
    with pytest.raises(SpecError) as refused:
        Remote(url)
    assert "verysecret" not in str(refused.value)


@pytest.mark.parametrize("url", ["file:///[team]", "s3://bucket/x?sig=verysecret"])
def test_a_url_with_a_pattern_is_refused(url: str):
    with pytest.raises(SpecError, match=r"has \*, \? or \[, which fsspec takes for a pattern") as refused:
        Remote(url)
    assert "verysecret" not in str(refused.value)
