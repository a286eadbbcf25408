"""What one machine made is whole on the next, from any fsspec file system, or is not there at all."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks import files
from tasks.artifacts import ArtifactStore, BaseCheckpoint, FetchedDataset, PublishedModel, TrainedAdapter
from tasks.check.run import check_storage
from tasks.errors import CorruptError, MissingError, SpecError
from tasks.remote import Remote
from tasks.remote_manifest import NOTE
from tests.tasks.test_artifacts import KEY, Knobs, _commit

ROOT = Path(__file__).resolve().parents[2]
ADAPTER_KEY, BASE_KEY = "cd" * 32, "ef" * 32


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/bucket"


def _machine(tmp_path: Path, name: str, url: str) -> ArtifactStore:
    return ArtifactStore(tmp_path / name, Remote(url))


def _commit_base(store: ArtifactStore, model_folder: Path | None = None) -> BaseCheckpoint:
    with store.claim(BaseCheckpoint, BASE_KEY) as claim:
        folder = model_folder or claim.folder / "model"
        files.write_text(folder / "model.safetensors", "weights")
        base = BaseCheckpoint(
            key=BASE_KEY,
            folder=str(claim.folder),
            model_folder=str(folder),
            origin="o",
            model_digest="d",
            num_parameters=1,
        )
        return claim.commit(base, spec=Knobs())


def _commit_adapter(store: ArtifactStore, weights: str = "lora", **changes: Any) -> TrainedAdapter:
    with store.claim(TrainedAdapter, ADAPTER_KEY) as claim:
        assert claim.found is None
        files.write_text(claim.folder / "checkpoints/checkpoint-1/optimizer.pt", "moments")
        files.write_text(claim.folder / "adapter/adapter_model.safetensors", weights)
        names = [name for name in TrainedAdapter.model_fields if name.startswith(("num", "first", "last", "valid"))]
        adapter = TrainedAdapter(
            key=ADAPTER_KEY,
            folder=str(claim.folder),
            parents=(f"dataset/{KEY}", f"base/{BASE_KEY}"),
            adapter_folder=str(claim.folder / "adapter"),
            adapter_digest=weights,
            base_folder=str(store.root / "base" / BASE_KEY[:16] / "model"),
            base_digest="d",
            **dict.fromkeys(names, 1),
            **changes,
        )
        return claim.commit(adapter, spec=Knobs())


def test_another_machine_finds_it_whole_with_its_own_paths(tmp_path: Path, url: str):
    here, there = _machine(tmp_path, "a", url), _machine(tmp_path, "elsewhere/b", url)
    _commit(here)
    _commit_base(here)
    made = _commit_adapter(here)
    with there.claim(TrainedAdapter, ADAPTER_KEY) as claim:
        found = claim.found
    assert found and found.adapter_digest == made.adapter_digest
    assert found.adapter_folder == str(there.root / "adapter" / ADAPTER_KEY[:16] / "adapter")
    assert Path(found.adapter_folder, "adapter_model.safetensors").read_text() == "lora"
    assert not (found.path / "checkpoints").exists()
    base = there.ancestor(found, BaseCheckpoint)  # brought when it is asked for
    assert Path(base.model_folder) == Path(found.base_folder)
    assert (Path(base.model_folder) / "model.safetensors").read_text() == "weights"
    assert there.find(TrainedAdapter, ADAPTER_KEY) == found
    assert not list(tmp_path.glob("elsewhere/b/*/.*.arriving"))


def test_names_are_found_there_and_only_what_is_chosen_is_brought(tmp_path: Path, url: str):
    here, there = _machine(tmp_path, "a", url), _machine(tmp_path, "b", url)
    _commit(here)
    _commit_base(here)
    _commit_adapter(here)
    assert [adapter.key for adapter in there.known(TrainedAdapter)] == [ADAPTER_KEY]
    assert there.committed(TrainedAdapter) == []
    assert there.record(TrainedAdapter, ADAPTER_KEY)
    assert there.choose(TrainedAdapter, "latest", lambda _: False) is None
    peeked = there.known(TrainedAdapter)[0]
    assert there.ancestor(peeked, BaseCheckpoint, needs_files=False).origin == "o"
    assert not list(there.root.rglob("model.safetensors"))
    chosen = there.choose(TrainedAdapter, ADAPTER_KEY[:8])
    assert chosen and Path(chosen.adapter_folder, "adapter_model.safetensors").is_file()
    assert not list(there.root.rglob("model.safetensors"))  # its base was not asked for


def test_what_was_listed_is_not_asked_for_again_to_choose_by(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    """A request for each candidate, and one for each of its parents, is seconds with a hundred of them."""
    here, there = _machine(tmp_path, "a", url), _machine(tmp_path, "b", url)
    _commit(here)
    _commit_base(here)
    _commit_adapter(here)
    asked: list[str] = []
    read = Remote.read
    monkeypatch.setattr(Remote, "read", lambda self, place: asked.append(place) or read(self, place))
    (listed,) = there.known(TrainedAdapter)
    for _ in range(3):
        assert there.record(TrainedAdapter, listed.key)
        assert there.ancestor(listed, BaseCheckpoint, needs_files=False)
    assert sorted(asked) == [f"base/{BASE_KEY[:16]}", f"dataset/{KEY[:16]}"]


def test_what_was_made_before_there_was_a_remote_is_sent_when_it_is_next_asked_for(tmp_path: Path, url: str):
    before = ArtifactStore(tmp_path / "a")
    _commit(before)
    here = _machine(tmp_path, "a", url)
    with here.claim(FetchedDataset, KEY) as claim:
        assert claim.found
    with _machine(tmp_path, "b", url).claim(FetchedDataset, KEY) as claim:
        assert claim.found and (claim.folder / "deep/validation.parquet").read_text() == "row"


def test_the_first_of_two_machines_counts_for_both_and_their_files_never_mix(tmp_path: Path, url: str):
    here, there = _machine(tmp_path, "a", url), _machine(tmp_path, "b", url)
    with there.claim(TrainedAdapter, ADAPTER_KEY) as claim:  # begun while nothing was there
        made = _commit_adapter(here, "lora of a")
        files.write_text(claim.folder / "adapter/adapter_model.safetensors", "lora of b")
        mine = made.model_copy(update={"adapter_folder": str(claim.folder / "adapter"), "adapter_digest": "lora of b"})
        committed = claim.commit(mine, spec=Knobs())
    assert committed.adapter_digest == "lora of a"
    assert Path(committed.adapter_folder) == there.folder(TrainedAdapter, ADAPTER_KEY) / "adapter"
    assert Path(committed.adapter_folder, "adapter_model.safetensors").read_text() == "lora of a"


def test_what_a_crash_left_gives_way_to_a_whole_one_but_not_a_job_that_may_run(tmp_path: Path, url: str):
    _commit_adapter(_machine(tmp_path, "a", url))
    for name, is_running in (("b", False), ("c", True)):
        store = _machine(tmp_path, name, url)
        left = store.folder(TrainedAdapter, ADAPTER_KEY)
        files.write_text(left / "checkpoints/checkpoint-1/optimizer.pt", "moments")
        if is_running:
            files.write_json(left / "slurm_job.json", {"id": "1"})
        with store.claim(TrainedAdapter, ADAPTER_KEY) as claim:
            assert (claim.found is None) is is_running
            assert (claim.folder / "checkpoints").exists() is is_running  # SLURM's job may be writing there


def test_a_file_that_changed_there_is_never_installed(tmp_path: Path, url: str):
    _commit(_machine(tmp_path, "a", url))
    (stored,) = (tmp_path / "bucket").rglob("validation.parquet")
    stored.write_text("raw")  # as long as it was
    there = _machine(tmp_path, "b", url)
    with (
        pytest.raises(CorruptError, match=r"validation\.parquet has sha256 .* its manifest says"),
        there.claim(FetchedDataset, KEY),
    ):
        pass
    assert there.find(FetchedDataset, KEY) is None
    stored.unlink()
    with pytest.raises(CorruptError, match="is gone, though a manifest lists it"), there.claim(FetchedDataset, KEY):
        pass
    (tmp_path / f"bucket/dataset/{KEY[:16]}/manifest.json").unlink()  # the way out that the message names
    _commit(there)
    assert stored.read_text() == "row"


def test_a_model_outside_the_store_is_brought_only_where_it_is(tmp_path: Path, url: str):
    models = tmp_path / "models/m"
    _commit_base(_machine(tmp_path, "a", url), models)
    with _machine(tmp_path, "b", url).claim(BaseCheckpoint, BASE_KEY) as claim:
        assert claim.found and claim.found.model_folder == str(models)
    models.rename(tmp_path / "gone")
    with _machine(tmp_path, "c", url).claim(BaseCheckpoint, BASE_KEY) as claim:
        assert claim.found is None


def test_what_speaks_of_one_machine_stays_there(tmp_path: Path, url: str):
    here = _machine(tmp_path, "a", url)
    with here.claim(PublishedModel, KEY) as claim:
        texts = dict.fromkeys(("place", "repo_id", "commit", "url", "model_folder", "model_digest"), "x")
        claim.commit(PublishedModel(key=KEY, folder=str(claim.folder), **texts), spec=Knobs())
    assert not (tmp_path / "bucket").exists()
    assert _machine(tmp_path, "b", url).known(PublishedModel) == []


def test_a_torn_manifest_there_is_said_and_not_taken_for_none(tmp_path: Path, url: str):
    here = _machine(tmp_path, "a", url)
    _commit(here)
    path = tmp_path / f"bucket/dataset/{KEY[:16]}/manifest.json"
    path.write_text(path.read_text()[:100])
    with (
        pytest.raises(CorruptError, match="is not a manifest of ours"),
        _machine(tmp_path, "b", url).claim(FetchedDataset, KEY),
    ):
        pass


def test_a_sender_that_is_killed_leaves_nothing_that_counts_and_the_next_goes_on(tmp_path: Path, url: str):
    """SIGKILL between the files and the manifest, then again: what is there already is not sent twice."""
    store = ArtifactStore(tmp_path / "a")
    _commit(store)
    code = f"""
import os, signal
from pathlib import Path
from tasks.artifacts import ArtifactStore, FetchedDataset
from tasks.remote import Remote
class Dying(Remote):
    def _announce(self, path, data):
        os.kill(os.getpid(), signal.SIGKILL)
store = ArtifactStore(Path({str(tmp_path / "a")!r}), Dying({url!r}))
with store.claim(FetchedDataset, {KEY!r}):
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (sent,) = (tmp_path / "bucket").rglob("train.parquet")
    time_sent = sent.stat().st_mtime_ns
    with _machine(tmp_path, "b", url).claim(FetchedDataset, KEY) as claim:
        assert claim.found is None
    with _machine(tmp_path, "a", url).claim(FetchedDataset, KEY):
        pass
    assert sent.stat().st_mtime_ns == time_sent
    with _machine(tmp_path, "c", url).claim(FetchedDataset, KEY) as claim:
        assert claim.found


def test_a_receiver_that_is_killed_goes_on_where_it_was(tmp_path: Path, url: str):
    _commit(_machine(tmp_path, "a", url))
    aside = tmp_path / "b/dataset" / f".{KEY[:16]}.arriving"
    files.write_text(aside / "train.parquet", "rows")  # whole: kept
    files.write_text(aside / "deep/validation.parquet", "r")  # torn
    files.write_text(aside / "other.parquet", "x")  # of one that was made anew since
    inode = (aside / "train.parquet").stat().st_ino
    with _machine(tmp_path, "b", url).claim(FetchedDataset, KEY) as claim:
        assert claim.found
        assert (claim.folder / "train.parquet").stat().st_ino == inode
        assert set(files.list_files(claim.folder)) == {
            "train.parquet",
            "deep/validation.parquet",
            "manifest.json",
            NOTE,
        }


def test_the_check_before_a_run_says_that_it_can_write(tmp_path: Path, url: str):
    assert "takes and returns files" in check_storage(_machine(tmp_path, "a", url))
    assert files.list_files(tmp_path / "bucket") == {}


def test_an_artifact_that_is_nowhere_names_both_places(tmp_path: Path, url: str):
    with pytest.raises(MissingError, match=rf"{tmp_path}/a or {url}"):
        _machine(tmp_path, "a", url).load(f"dataset/{KEY}")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("bucket/prefix", "expected a URL like s3://"),
        ("s3://", "expected a URL like s3://"),
        ("ftp://ada:secret@host/x", "holds a login"),
        ("nothing://bucket/x", "can't be opened"),
    ],
)
def test_a_wrong_url_is_refused_without_showing_a_password(url: str, message: str):
    with pytest.raises((SpecError, MissingError), match=message) as refused:
        Remote(url)
    assert "secret" not in str(refused.value)


def test_a_missing_package_is_named():
    with pytest.raises(MissingError, match="needs gcsfs: install it"):
        Remote("gs://bucket/prefix")


def test_the_variable_names_the_remote(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TATARA_HOME", str(tmp_path / "a"))
    assert ArtifactStore.default().remote is None
    monkeypatch.setenv("TATARA_REMOTE", f"{url}/")
    remote = ArtifactStore.default().remote
    assert remote and remote.url == url


def test_a_manifest_there_tells_each_digest_and_the_root_that_its_paths_began_with(tmp_path: Path, url: str):
    here = _machine(tmp_path, "a", url)
    _commit_base(here)
    whole = json.loads((tmp_path / f"bucket/base/{BASE_KEY[:16]}/manifest.json").read_text())
    assert whole["root"] == str(here.root)
    assert set(whole["digests"]) == set(whole["files"]) == {"model/model.safetensors"}
