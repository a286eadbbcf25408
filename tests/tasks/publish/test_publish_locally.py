"""publish_model without a token: a folder in the layout of the Hub's cache."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, scan_cache_dir, snapshot_download

from tasks import files
from tasks.artifacts import ArtifactStore, MergedModel, PublishedModel
from tasks.publish import staging
from tasks.publish.run import publish_model
from tasks.specs import PublishSpec
from tests import tiny
from tests.tasks.publish.conftest import MADE, make_merged

NOBODY = HfApi(token=False)


class PowerCutError(Exception):
    """The machine stops here."""


def test_the_hub_client_resolves_it_offline(store: ArtifactStore, merged: MergedModel):
    published = publish_model(merged, PublishSpec(repo_id="ada/tuned"), store, NOBODY)
    assert constants.HF_HUB_OFFLINE and published.place == "local" and published.url.startswith("file://")
    found = snapshot_download("ada/tuned", cache_dir=store.root / "hub", local_files_only=True)
    assert Path(found) == Path(published.model_folder) == store.root / f"hub/models--ada--tuned/snapshots/{found[-40:]}"
    by_commit = snapshot_download("ada/tuned", revision=published.commit, cache_dir=store.root / "hub")
    assert by_commit == found
    sent = {
        name: files.digest(Path(merged.model_folder) / name) for name in files.list_files(Path(merged.model_folder))
    }
    arrived = {name: files.digest(Path(found) / name) for name in files.list_files(Path(found))}
    assert arrived.pop("README.md") and arrived.pop("recipe.json") and arrived.pop("loss_curve.png")
    assert arrived == sent
    assert [repo.repo_id for repo in scan_cache_dir(store.root / "hub").repos] == ["ada/tuned"]


def test_without_a_repo_it_is_named_after_the_model(store: ArtifactStore, merged: MergedModel):
    published = publish_model(merged, PublishSpec(), store, NOBODY)
    assert published.repo_id == f"local/tatara-{merged.short}" and published.commit == merged.model_digest[:40]


def test_what_lacks_is_said(store: ArtifactStore, merged: MergedModel, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "tasks.publish.run")
    publish_model(merged, PublishSpec(repo_id="ada/tuned"), store, NOBODY)
    publish_model(merged, PublishSpec(), store, NOBODY)
    publish_model(merged, PublishSpec(revision="other"), store, HfApi(token="hf_" + "x" * 34))
    said = [record.getMessage().partition(":")[0] for record in caplog.records if record.name == "tasks.publish.run"]
    assert said == ["the repo ada/tuned but no token given", "no repo and token given", "no repo given"]


def test_transformers_loads_it_by_its_name(store: ArtifactStore):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = make_merged(store, tiny.save_model)
    published = publish_model(merged, PublishSpec(), store, NOBODY)
    model = AutoModelForCausalLM.from_pretrained(published.repo_id, cache_dir=store.root / "hub", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(published.repo_id, cache_dir=store.root / "hub")
    ids = torch.tensor([tokenizer("祭り")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny.make_model()(ids).logits)


def test_it_costs_no_disk(store: ArtifactStore, merged: MergedModel):
    published = publish_model(merged, PublishSpec(), store, NOBODY)
    shard = "model-00001-of-00002.safetensors"
    assert (Path(published.model_folder) / shard).samefile(Path(merged.model_folder) / shard)


def test_a_snapshot_that_lost_a_file_is_made_again(store: ArtifactStore, merged: MergedModel):
    first = publish_model(merged, PublishSpec(), store, NOBODY)
    shard = Path(first.model_folder) / "model-00001-of-00002.safetensors"
    shard.unlink()
    assert publish_model(merged, PublishSpec(), store, NOBODY) == first
    assert shard.is_file()


@pytest.mark.parametrize("links_made", [0, 3, 9])
def test_an_interrupted_publish_leaves_nothing_half(
    store: ArtifactStore, merged: MergedModel, monkeypatch: pytest.MonkeyPatch, links_made: int
):
    made = 0
    link = staging.link

    def link_until_the_cut(source: Path, target: Path) -> None:
        nonlocal made
        if made == links_made:
            raise PowerCutError
        made += 1
        link(source, target)

    monkeypatch.setattr(staging, "link", link_until_the_cut)
    with pytest.raises(PowerCutError):
        publish_model(merged, PublishSpec(repo_id="ada/tuned"), store, NOBODY)
    assert made == links_made and store.committed(PublishedModel) == []
    assert not (store.root / "hub/models--ada--tuned/snapshots" / merged.model_digest[:40]).exists()
    with pytest.raises(FileNotFoundError):
        snapshot_download("ada/tuned", cache_dir=store.root / "hub", local_files_only=True)
    monkeypatch.setattr(staging, "link", link)
    published = publish_model(merged, PublishSpec(repo_id="ada/tuned"), store, NOBODY)
    found = snapshot_download("ada/tuned", cache_dir=store.root / "hub", local_files_only=True)
    assert {*files.list_files(Path(found))} == {*files.list_files(Path(merged.model_folder)), *MADE}
    assert [path.name for path in (store.root / "hub/models--ada--tuned/snapshots").iterdir()] == [published.commit]


def test_a_cut_before_the_name_points_there_is_mended(
    store: ArtifactStore, merged: MergedModel, monkeypatch: pytest.MonkeyPatch
):
    write_text = files.write_text

    def cut_at_the_ref(path: Path, text: str) -> None:
        if path.name == "main":
            raise PowerCutError
        write_text(path, text)

    monkeypatch.setattr(files, "write_text", cut_at_the_ref)
    with pytest.raises(PowerCutError):
        publish_model(merged, PublishSpec(repo_id="ada/tuned"), store, NOBODY)
    monkeypatch.setattr(files, "write_text", write_text)
    published = publish_model(merged, PublishSpec(repo_id="ada/tuned"), store, NOBODY)
    found = snapshot_download("ada/tuned", cache_dir=store.root / "hub", local_files_only=True)
    assert found == published.model_folder
