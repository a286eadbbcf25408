"""A model that was trained with rewards is published like any other: files, a card of its own, digests that hold."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi

from flows.recipes import resolve_ppo
from tasks import files
from tasks.artifacts import ArtifactStore, PreparedQuestions, ReinforcedModel
from tasks.errors import CorruptError, SpecError
from tasks.publish.lineage import whole_lineage_of
from tasks.publish.reinforced_card import ReinforcedLineage, reinforced_card, reinforced_reproduction
from tasks.publish.run import publish_model
from tasks.serve.weights import require_merged_files
from tasks.specs import PublishSpec
from tests.hub_server import WRITE, HubServer
from tests.reinforced import NOBODY, make_reinforced


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def model(store: ArtifactStore) -> ReinforcedModel:
    return make_reinforced(store, store.root.parent / "base", resolve_ppo("tiny_ppo"))[1]


def test_it_arrives_on_the_hub_with_a_card_of_its_training(
    store: ArtifactStore, model: ReinforcedModel, hub: HubServer
):
    published = publish_model(model, PublishSpec(repo_id="ada/ppo"), store, HfApi(endpoint=hub.url, token=WRITE))
    held = hub.content("model", "ada/ppo")
    sent = {name: (Path(model.model_folder) / name).read_bytes() for name in files.list_files(Path(model.model_folder))}
    assert {**held, **sent} == held
    assert set(held) - set(sent) == {"README.md", "recipe.json", "reward_curve.png", ".gitattributes"}
    assert held["reward_curve.png"].startswith(b"\x89PNG")
    assert published.parents == (model.ref,) and published.model_digest == model.model_digest
    card = held["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["tags"] == ["tatara", "ppo", "verl"] and "base_model" not in front  # the base is a folder
    for said in (
        f"`base`, {model.num_parameters:,} parameters",
        f"| digest of the base | `{model.base_digest}` |",
        "| questions | `shipped` at `",
        "| licence of the questions | `apache-2.0` |",
        "| reward | verl's for `openai/gsm8k` |",
        "PPO (`verl.trainer.main_ppo`), a critic that began as the base",
        "| steps | 4 of 8 questions, updates of 4 |",
        "actor 1e-06, critic 1e-05",
        "0.001 times the KL to the base taken off the reward",
        "| mean reward | 0.1250 at step 1, 0.5000 at step 4 |",
        "| mean score on the test questions | 0.0000 before, 0.2500 after |",
        f"| digest of the model | `{model.model_digest}` |",
        "| verl | `0.9.1` |",
    ):
        assert said in card, said


def test_the_recipe_beside_it_makes_it_again(store: ArtifactStore, model: ReinforcedModel):
    recipe, _ = make_reinforced(store, store.root.parent / "base", resolve_ppo("tiny_ppo"))
    published = publish_model(model, PublishSpec(repo_id="ada/again"), store, NOBODY)
    kept = files.read_json(Path(published.model_folder) / "recipe.json")
    again = resolve_ppo(kept["recipe"], kept["changes"])
    assert (again.ppo, again.questions) == (recipe.ppo, recipe.questions)
    assert again.base.model == "base" and recipe.base.model == str(store.root.parent / "base")


def test_where_it_ran_and_whose_folders_it_read_is_not_told(store: ArtifactStore, model: ReinforcedModel):
    """As a store holds it that was written before Specs refused a proxy's login."""
    found = whole_lineage_of(model, store, NOBODY, goes_to_hub=False)
    assert isinstance(found, ReinforcedLineage) and found.questions
    place = {"HTTPS_PROXY": "http://ada:private@proxy:3128", "NCCL_SOCKET_IFNAME": "private0", "NVTE_FUSED_ATTN": "0"}
    words = ["+reward.custom_reward_function.path=/home/private/reward.py", "trainer.wandb_api_key=private", "a.b=1"]
    source = "/home/private/questions.csv"
    here = replace(
        found,
        base=found.base.model_copy(update={"origin": "/home/private/mine"}),
        spec={**found.spec, "environment": place, "overrides": words, "critic_model": "/home/private/critic"},
        questions=found.questions.model_copy(update={"source": source}),
        questions_spec={**found.questions_spec, "source": source, "test_source": "/home/private/test.csv"},
    )
    card, made = reinforced_card(here, PublishSpec(), "ada/ppo"), reinforced_reproduction(here)["changes"]
    assert "private" not in card + json.dumps(made)
    assert made["ppo"]["environment"] == {"NVTE_FUSED_ATTN": "0"} and made["ppo"]["critic_model"] == "critic"
    assert made["ppo"]["overrides"] == ["+reward.custom_reward_function.path=reward.py", "a.b=1"]
    assert made["questions"]["source"] == "questions.csv" and made["base"]["model"] == "mine"
    assert f"`questions.csv` with the digest `{found.questions.revision}`" in card


def test_it_is_published_without_questions_that_were_cleared_away(tmp_path: Path):
    store = ArtifactStore(tmp_path / "store")
    _, model = make_reinforced(store, tmp_path / "base", resolve_ppo("tiny_ppo"), num_steps=0)
    shutil.rmtree(store.ancestor(model, PreparedQuestions).path)
    published = publish_model(model, PublishSpec(repo_id="ada/lost"), store, NOBODY)
    card = (Path(published.model_folder) / "README.md").read_text()
    for said in ("| questions | not known |", "| licence of the questions | not known |", "| reward | not known |"):
        assert said in card, said
    assert "Its questions are not known any more: name them in `changes.questions`" in card
    kept = files.read_json(Path(published.model_folder) / "recipe.json")
    assert "questions" not in kept["changes"] and resolve_ppo(kept["recipe"], kept["changes"]).base.model == "base"


def test_its_files_are_compared_before_they_are_served(store: ArtifactStore, model: ReinforcedModel):
    published = publish_model(model, PublishSpec(repo_id="ada/compared"), store, NOBODY)
    require_merged_files(published, store)
    swapped = published.model_copy(update={"model_folder": model.base_folder})
    with pytest.raises(CorruptError, match=r"is not the reinforced file: it has sha256 .* nothing was started"):
        require_merged_files(swapped, store)


def test_it_has_no_adapter_to_publish(store: ArtifactStore, model: ReinforcedModel):
    with pytest.raises(SpecError, match=r"what = 'both', but PPO .* is a whole model without an adapter"):
        publish_model(model, PublishSpec(what="both"), store, NOBODY)
