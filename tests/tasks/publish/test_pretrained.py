"""A pretrained model is published like any other: its files, a card that tells of its training, digests that hold."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi

from tasks import files
from tasks.artifacts import ArtifactStore, PretrainedModel
from tasks.errors import CorruptError, SpecError
from tasks.publish.base_card import BaseLineage, base_card, base_reproduction
from tasks.publish.lineage import whole_lineage_of
from tasks.publish.run import publish_model
from tasks.serve.weights import require_merged_files
from tasks.specs import PublishSpec
from tests.pretrained import make_pretrained

NOBODY = HfApi(token=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def model(store: ArtifactStore) -> PretrainedModel:
    return make_pretrained(store)


def test_files_card_and_recipe_are_there(store: ArtifactStore, model: PretrainedModel):
    published = publish_model(model, PublishSpec(repo_id="ada/small"), store, NOBODY)
    folder = Path(published.model_folder)
    sent, there = files.list_files(Path(model.model_folder)), files.list_files(folder)
    assert {**there, **sent} == there and set(there) - set(sent) == {"README.md", "recipe.json", "loss_curve.png"}
    assert published.model_digest == model.model_digest and published.parents == (model.ref,)
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["tags"] == ["tatara", "gpt_oss", "pretrained"] and "base_model" not in front
    for said in (
        f"{model.num_parameters:,} parameters",
        "| vocabulary | 512 |",
        "`short_english` at `dddd",
        "25 documents",
        "| tokenizer | `train` |",
        f"{model.first_loss:.4f} at the first step, {model.last_loss:.4f} at the end",
        "| held-out loss | not measured: nothing was held out |",
        "it answers `/v1/completions` only",
        model.model_digest,
    ):
        assert said in card, said
    recipe = files.read_json(folder / "recipe.json")
    assert recipe["changes"]["shape"]["vocab_size"] == 512 and recipe["changes"]["seed"] == 1


def test_whose_folders_it_read_is_not_told(store: ArtifactStore, model: PretrainedModel):
    found = whole_lineage_of(model, store, NOBODY, goes_to_hub=False)
    assert isinstance(found, BaseLineage)
    spec = {**found.spec, "corpus": "/home/private/books", "tokenizer": "/home/private/words"}
    here = replace(found, spec=spec)
    card, made = base_card(here, PublishSpec(), "ada/small"), base_reproduction(here)["changes"]
    assert "private" not in card and (made["corpus"], made["tokenizer"]) == ("books", "words")
    assert "The corpus was a local file or folder, `books` with the digest `dddd" in card
    lost = base_card(replace(here, corpus={}), PublishSpec(), "ada/small")
    assert "a local file or folder, `books`: name yours in `changes.corpus`" in lost


def test_its_files_are_compared_before_they_are_served(store: ArtifactStore, model: PretrainedModel, tmp_path: Path):
    published = publish_model(model, PublishSpec(repo_id="ada/compared"), store, NOBODY)
    require_merged_files(published, store)
    untrained = publish_model(make_pretrained(store, 0), PublishSpec(repo_id="ada/random"), store, NOBODY)
    swapped = published.model_copy(update={"model_folder": untrained.model_folder})
    with pytest.raises(
        CorruptError, match=r"model\.safetensors is not the pretrained file: it has .* nothing was started"
    ):
        require_merged_files(swapped, store)
    added = Path(published.model_folder) / "tokenizer.model"
    added.write_text("x")
    with pytest.raises(CorruptError, match=r"tokenizer\.model, which the pretrained model has not"):
        require_merged_files(published, store)
    added.unlink()


def test_it_has_no_adapter_to_publish(store: ArtifactStore, model: PretrainedModel):
    for what in ("adapter", "both"):
        with pytest.raises(SpecError, match=f"what = '{what}', but pretrained .* is a whole model without an adapter"):
            publish_model(model, PublishSpec(what=what), store, NOBODY)
