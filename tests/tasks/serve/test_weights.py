"""What vLLM is given is compared with the merge byte by byte, before anything is started."""

import json
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from tasks import files
from tasks.artifacts import ArtifactStore, MergedModel, PublishedModel
from tasks.errors import CorruptError, MissingError
from tasks.publish.run import publish_model
from tasks.serve import weights as subject
from tasks.serve.run import serve_model
from tasks.specs import PublishSpec, ServeSpec
from tests.hub_server import WRITE, HubServer, hub_fixture  # noqa: F401  (the fixture `hub`)
from tests.tasks.publish.conftest import make_merged

NOBODY = HfApi(token=False)


def _note_digests(merged: MergedModel) -> None:
    """What tasks/merge writes down of each file."""
    manifest = merged.path / "manifest.json"
    content = json.loads(manifest.read_text())
    folder = Path(merged.model_folder)
    content["about"]["digests"] = {name: files.digest(folder / name) for name in files.list_files(folder)}
    manifest.write_text(json.dumps(content))


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


@pytest.fixture
def published(store: ArtifactStore) -> PublishedModel:
    """A local publication of two shards whose files are its own, not links: a test may damage them."""
    merged = make_merged(store)
    _note_digests(merged)
    published = publish_model(merged, PublishSpec(), store, NOBODY)
    folder = Path(published.model_folder)
    shutil.copytree(folder, folder.with_name("copy"))
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)
    return published


def test_what_was_merged_may_be_served_and_is_read_once(
    store: ArtifactStore, published: PublishedModel, monkeypatch: pytest.MonkeyPatch
):
    subject.require_merged_files(published, store)
    read: list[Path] = []
    digest = files.digest
    monkeypatch.setattr(files, "digest", lambda path: (read.append(path), digest(path))[1])
    subject.require_merged_files(published, store)
    assert read == []
    shard = Path(published.model_folder) / "model-00002-of-00002.safetensors"
    os.utime(shard)
    subject.require_merged_files(published, store)  # touched: read again, and the same
    assert read == [shard]


def _flip(path: Path, at: int) -> None:
    """Change one byte and set the time of the last change back, as a fault of the disk would leave it."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


SHARD = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: _flip(folder / SHARD, -1), rf"{SHARD} is not the merged file: it has sha256 \w+"),
        (lambda folder: _flip(folder / SHARD, 15_000), rf"{SHARD} is not the merged file"),
        (lambda folder: os.truncate(folder / SHARD, 10_000), rf"{SHARD} has 10000 bytes but its header describes"),
        (lambda folder: (folder / SHARD).unlink(), rf"{SHARD} is not the merged file: it is missing"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"stale": 1}'), r"tokenizer\.json is not the merged"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json is not the merged file: it is missing"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ old }}"), r"holds chat_template\.jinja, which"),
        (lambda folder: (folder / "extra.safetensors").write_bytes(b"x"), r"holds extra\.safetensors, which"),
    ],
)
@pytest.mark.parametrize("seen_before", [True, False])
def test_a_damaged_file_is_named_before_the_start(
    store: ArtifactStore, published: PublishedModel, damage, message: str, seen_before: bool
):
    folder = Path(published.model_folder)
    if seen_before:
        subject.require_merged_files(published, store)
    damage(folder)
    with pytest.raises(CorruptError, match=message):
        serve_model(published, ServeSpec(), store)
    assert not (store.root / "services").exists()  # nothing was started, and nothing stopped


def test_another_model_under_this_name_is_refused(store: ArtifactStore, published: PublishedModel, tmp_path: Path):
    other = make_merged(ArtifactStore(tmp_path / "other"), lambda folder: _write_other(folder))
    sabotaged = published.model_copy(update={"model_folder": other.model_folder})
    with pytest.raises(CorruptError, match=r"model-00001-of-00002\.safetensors is not the merged file"):
        serve_model(sabotaged, ServeSpec(), store)


def _write_other(folder: Path) -> None:
    from tests.tasks.publish.conftest import write_model

    write_model(folder, first=7)


def test_a_digest_that_was_edited_is_found(store: ArtifactStore, published: PublishedModel):
    forged = published.model_copy(update={"model_digest": "0" * 64})
    with pytest.raises(CorruptError, match=r"says model digest 0000000000000000\.\.\., its merged parent"):
        serve_model(forged, ServeSpec(), store)


def test_without_the_merged_artifact_the_digest_over_all_files_counts(store: ArtifactStore, published: PublishedModel):
    shutil.rmtree(store.root / "merged")
    subject.require_merged_files(published, store)
    _flip(Path(published.model_folder) / SHARD, -1)
    with pytest.raises(CorruptError, match="which file differs is not known"):
        subject.require_merged_files(published, store)


def test_the_commit_is_fetched_when_the_folder_is_gone(
    store: ArtifactStore, tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
):
    """And compared like any other; the commit that was published, not what the branch holds by now."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    merged = make_merged(store)
    _note_digests(merged)
    client = HfApi(endpoint=hub.url, token=WRITE)
    published = publish_model(merged, PublishSpec(repo_id="ada/tuned"), store, client)
    shutil.rmtree(published.model_folder)
    client.upload_file(path_or_fileobj=b"later", path_in_repo="tokenizer.json", repo_id="ada/tuned")
    found = subject.locate_model(published, client)
    assert Path(found.model_folder).name == published.commit
    subject.require_merged_files(found, store)


def test_a_publication_that_is_gone_is_said(store: ArtifactStore, published: PublishedModel):
    shutil.rmtree(published.model_folder)
    with pytest.raises(MissingError, match=r"is not at .* any more: run its flow again"):
        serve_model(published, ServeSpec(), store)


def test_an_adapter_published_beside_is_nothing_that_a_server_loads(store: ArtifactStore, published: PublishedModel):
    beside = Path(published.model_folder) / "adapter"
    beside.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        (beside / name).write_text("x")
    subject.require_merged_files(published, store)
    shutil.rmtree(store.root / "merged")
    subject.require_merged_files(published, store)
