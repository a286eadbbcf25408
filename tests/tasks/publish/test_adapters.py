"""Adapters on the Hub: alone, or beside the merged model; loaded again by PEFT, as a stranger would."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model

from tasks import files
from tasks.artifacts import ArtifactStore, MergedModel, TrainedAdapter
from tasks.errors import SpecError
from tasks.publish.run import publish_model
from tasks.specs import PublishSpec
from tests import tiny
from tests.hub_server import WRITE, HubServer
from tests.tasks.publish.conftest import MADE, make_merged

REPO = "ada/tuned"
ADAPTER = PublishSpec(repo_id=REPO, what="adapter")
NOBODY = HfApi(token=False)
ADAPTER_FILES = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"}


def client(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.url, token=WRITE)


@pytest.fixture
def adapter(store: ArtifactStore, merged: MergedModel) -> TrainedAdapter:
    """The adapter behind the merged model."""
    return store.ancestor(merged, TrainedAdapter)


def test_an_adapter_alone_is_published(store: ArtifactStore, adapter: TrainedAdapter, hub: HubServer):
    published = publish_model(adapter, ADAPTER, store, client(hub))
    held = hub.content("model", REPO)
    assert held.keys() == {*ADAPTER_FILES, *MADE, ".gitattributes"}
    config = json.loads(held["adapter_config.json"])
    assert config["base_model_name_or_path"] == "ada/base" and config["revision"] == "b" * 40
    assert not [data for data in held.values() if b"/home/ada/private" in data]  # where the base lay when it trained
    card = held["README.md"].decode()
    assert "library_name: peft" in card and "base_model_relation: adapter" in card and "PeftModel" in card
    assert adapter.adapter_digest in card and "merge_ledger" not in card
    assert published.what == "adapter" and published.model_digest == adapter.adapter_digest
    hub.requests.clear()
    assert publish_model(adapter, ADAPTER, store, client(hub)) == published
    assert hub.requests == [("GET", f"/api/models/{REPO}/revision/main")]


def test_of_a_merged_model_only_the_adapter_goes_and_the_model_is_still_served(
    store: ArtifactStore, merged: MergedModel, hub: HubServer
):
    published = publish_model(merged, ADAPTER, store, client(hub))
    assert not [name for name in hub.content("model", REPO) if name.startswith("model")]
    assert published.model_folder == merged.model_folder and published.model_digest == merged.model_digest


def test_both_are_one_commit(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    published = publish_model(merged, PublishSpec(repo_id=REPO, what="both"), store, client(hub))
    held = hub.content("model", REPO).keys() - {".gitattributes"}
    assert held == {*files.list_files(Path(merged.model_folder)), *MADE, "adapter/adapter_config.json"} | {
        "adapter/adapter_model.safetensors"
    }
    assert hub.count("POST", "/commit/") == 1
    assert published.model_digest == merged.model_digest and (Path(published.model_folder) / "config.json").is_file()


def test_what_is_published_next_is_not_mixed_with_what_was_there(
    store: ArtifactStore, merged: MergedModel, hub: HubServer
):
    """transformers loads an adapter_config.json beside a model, and PEFT's weights are a .safetensors too."""
    publish_model(merged, PublishSpec(repo_id=REPO, what="both"), store, client(hub))
    publish_model(merged, ADAPTER, store, client(hub))
    loaded = {name for name in hub.content("model", REPO) if name.endswith((".safetensors", "config.json"))}
    assert loaded == {"adapter_model.safetensors", "adapter_config.json", "tokenizer_config.json"}
    publish_model(merged, PublishSpec(repo_id=REPO), store, client(hub))
    assert not [name for name in hub.content("model", REPO) if "adapter_" in name]


def test_an_adapter_is_no_merged_model(store: ArtifactStore, adapter: TrainedAdapter):
    with pytest.raises(SpecError, match=r"PublishSpec.what = 'both' needs a merged model, but adapter"):
        publish_model(adapter, PublishSpec(what="both"), store, NOBODY)


def test_without_a_token_it_is_kept_in_hub_layout(store: ArtifactStore, adapter: TrainedAdapter):
    published = publish_model(adapter, PublishSpec(what="adapter", revision="v2", tag="v2.1"), store, NOBODY)
    folder = Path(published.model_folder)
    assert published.commit == adapter.adapter_digest[:40] == folder.name
    assert {*files.list_files(folder)} == {*ADAPTER_FILES, *MADE}
    refs = folder.parents[1] / "refs"
    assert {name: (refs / name).read_text() for name in files.list_files(refs)} == dict.fromkeys(
        ("v2", "v2.1"), published.commit
    )


def test_a_stranger_loads_the_adapter_and_gets_the_tuned_model(store: ArtifactStore, hub: HubServer, tmp_path: Path):
    """A real PEFT adapter on real weights, pulled from the Hub: its logits are those of the model that was trained."""
    tuned = get_peft_model(
        tiny.make_model(),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]),
    )
    torch.manual_seed(0)
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapter = store.ancestor(make_merged(store, adapt=tuned.save_pretrained), TrainedAdapter)
    published = publish_model(adapter, ADAPTER, store, client(hub))
    pulled = client(hub).snapshot_download(REPO, revision=published.commit, cache_dir=tmp_path / "cache")
    loaded = PeftModel.from_pretrained(tiny.make_model(), pulled)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected, found, base = tuned(ids).logits, loaded(ids).logits, tiny.make_model()(ids).logits
    assert torch.equal(found, expected) and not torch.allclose(found, base, atol=1e-3)
