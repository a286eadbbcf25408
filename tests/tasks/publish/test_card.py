"""The model card: what it tells, that the Hub takes it, and that no name breaks it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from huggingface_hub import HfApi, ModelCardData, RepoCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from prefect.utilities.callables import parameter_schema

from flows.finetune import finetune
from flows.recipes import resolve, resolve_base
from tasks.artifacts import ArtifactStore, FetchedDataset, MergedModel, PretrainedModel
from tasks.publish.card import model_card
from tasks.publish.facts import Lineage, SourceCard, command, reproduction
from tasks.publish.lineage import lineage_of
from tasks.publish.names import without_folder
from tasks.publish.run import publish_model
from tasks.specs import PublishSpec
from tests.hub_server import WRITE, HubServer, _faults_of_card
from tests.tasks.publish.conftest import make_merged

NOBODY = HfApi(token=False)
SPEC = PublishSpec(repo_id="ada/tuned")


@pytest.fixture
def lineage(store: ArtifactStore, merged: MergedModel) -> Lineage:
    return lineage_of(merged, store, NOBODY, goes_to_hub=False)


def front(card: str) -> dict[str, Any]:
    found = RepoCard(card).data.to_dict()
    assert _faults_of_card(card) == ([], [])
    return found


def tables(card: str) -> list[list[list[str]]]:
    """Parse the card as GitHub and the Hub do: tables -> rows -> text of the cells."""
    parser = MarkdownIt("commonmark").enable("table")
    found: list[list[list[str]]] = []
    for token in parser.parse(card.split("\n---\n", 1)[1]):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.level >= 3:
            inner = token.children or []
            if found[-1]:
                found[-1][-1].append("".join(child.content for child in inner))
    return found


def test_it_tells_the_whole_run(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    hub.add_repo("model", "ada/base", {"README.md": b"---\nlicense: apache-2.0\nlanguage: en\n---\n"})
    base = hub.repos["model", "ada/base"]
    base.commits["b" * 40] = base.commits[base.branches["main"]]
    publish_model(merged, SPEC, store, HfApi(endpoint=hub.url, token=WRITE))
    held = hub.content("model", "ada/tuned")
    card = held["README.md"].decode()
    said = front(card)
    assert said["license"] == "apache-2.0" and said["base_model"] == "ada/base" and said["language"] == ["ja"]
    assert said["base_model_relation"] == "finetune" and said["library_name"] == "transformers"
    [result] = RepoCard(card).data.to_dict()["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 2.2 and result["dataset"]["type"] == "local"
    sources, training, merge, versions = tables(card)
    assert ["licence of the data", "apache-2.0"] in sources and ["licence of the base", "apache-2.0"] in sources
    assert ["validation loss", "3.1000 before, 2.2000 after"] in training
    assert ["digest of the model", merged.model_digest] in merge
    assert {"torch", "transformers", "trl", "peft", "python"} <= {row[0] for row in versions if row}
    assert "![Training loss" in card and held["loss_curve.png"].startswith(b"\x89PNG")
    assert command(lineage_of(merged, store, NOBODY, goes_to_hub=False)) in card
    assert json.dumps(json.loads(held["recipe.json"]), ensure_ascii=False, indent=2) in card


def test_the_hub_is_asked_for_the_data_sets_licence_at_its_commit(store: ArtifactStore, hub: HubServer):
    repo = hub.add_repo("dataset", "ada/rows", {"README.md": b"---\nlicense: cc-by-4.0\nlanguage:\n- ja\n- en\n---\n"})
    repo.commits["a" * 40] = repo.commits[repo.branches["main"]]
    hub.add_repo("dataset", "ada/rows", {"README.md": b"---\nlicense: mit\n---\n"})
    merged = make_merged(store, source="ada/rows")
    dataset = store.ancestor(merged, FetchedDataset)
    repo.commits[dataset.revision] = repo.commits["a" * 40]
    card = model_card(lineage_of(merged, store, HfApi(endpoint=hub.url), goes_to_hub=True), SPEC, "ada/tuned")
    assert front(card)["datasets"] == ["ada/rows"] and front(card)["language"] == ["ja", "en"]
    assert ["licence of the data", "cc-by-4.0"] in tables(card)[0]


def test_what_is_not_known_is_said_and_what_a_person_states_counts(lineage: Lineage):
    unknown = replace(lineage, data_card=SourceCard(), base_card=SourceCard())
    card = model_card(unknown, SPEC, "ada/tuned")
    assert front(card)["license"] == "unknown"
    assert [row for row in tables(card)[0] if row[:1] == ["licence of the data"]] == [
        ["licence of the data", "not known"]
    ]
    stated = model_card(unknown, PublishSpec(license="mit", data_license="cc-by-4.0"), "ada/tuned")
    assert front(stated)["license"] == "mit" and ["licence of the data", "cc-by-4.0"] in tables(stated)[0]
    other = replace(lineage, base_card=SourceCard(license="other", license_name="own", license_link="https://h/l"))
    said = front(model_card(other, SPEC, "ada/tuned"))
    assert (said["license"], said["license_name"], said["license_link"]) == ("other", "own", "https://h/l")


def test_losses_that_are_no_numbers_are_no_result(lineage: Lineage):
    broken = replace(lineage, adapter=lineage.adapter.model_copy(update={"validation_loss_after": float("nan")}))
    assert "model-index" not in front(model_card(broken, SPEC, "ada/tuned"))


@pytest.mark.parametrize("what", ["merged", "adapter", "both"])
def test_the_front_matter_survives_the_hubs_own_class(lineage: Lineage, what: Any):
    card = model_card(lineage, PublishSpec(what=what), "ada/tuned")
    values = yaml.safe_load(card.split("---\n")[1])
    again = ModelCardData(**values, ignore_metadata_errors=False)
    assert yaml.safe_load(again.to_yaml()) == values
    assert values["library_name"] == ("peft" if what == "adapter" else "transformers")


def test_the_recipe_makes_the_same_run_again(lineage: Lineage):
    made = reproduction(lineage)
    recipe = resolve(made["recipe"], made["changes"])
    assert recipe.fetch.model_dump(mode="json") == lineage.specs["fetch"]
    assert recipe.pack.model_dump(mode="json") == lineage.specs["pack"]
    assert recipe.train.model_dump(mode="json") == lineage.specs["train"]
    assert recipe.merge.model_dump(mode="json") == lineage.specs["merge"]
    assert (recipe.base.model, recipe.base.revision) == ("ada/base", "b" * 40)
    jsonschema.validate(made, parameter_schema(finetune).model_dump())  # what the deployment enforces
    assert "finetune/h100" in command(lineage)


def test_a_base_that_was_made_here_is_made_again(lineage: Lineage):
    tiny = resolve("tiny")
    base = PretrainedModel(**lineage.base.model_dump(), num_steps=1, first_loss=2.0, last_loss=1.0)
    here = replace(lineage, base=base.model_copy(update={"origin": "pretrained 12345678"}))
    specs = {**here.specs, "base": resolve_base(tiny).model_dump(mode="json")}
    made = reproduction(replace(here, specs=specs))
    assert resolve_base(tiny, made["base_changes"]) == resolve_base(tiny)
    jsonschema.validate(made, parameter_schema(finetune).model_dump())
    assert resolve(made["recipe"], made["changes"]).base == tiny.base and "finetune/tiny" in command(here)
    assert "base_model" not in front(model_card(here, SPEC, "ada/tuned"))


def test_a_moving_branch_of_the_data_is_pinned(lineage: Lineage):
    dataset = lineage.dataset.model_copy(update={"source": "ada/rows", "revision": "e" * 40})
    specs = {**lineage.specs, "fetch": {**lineage.specs["fetch"], "source": "ada/rows"}}
    assert reproduction(replace(lineage, dataset=dataset, specs=specs))["changes"]["fetch"]["revision"] == "e" * 40


def test_where_it_ran_and_whose_folders_it_read_is_not_told(lineage: Lineage):
    """As a store holds it that was written before Specs refused a proxy's login."""
    launch = {"launcher": "ray", "ray_address": "http://head.private:8265", "nodes": 2, "account": "private"}
    launch |= {"environment": {"https_proxy": "http://ada:private@proxy:3128"}, "setup": ["cd /home/private"]}
    fetch = {"source": "/home/private/rows.csv", "validation_source": "/home/private/held_out.csv"}
    specs = {**lineage.specs, "train": {**lineage.specs["train"], "launch": launch}, "warm_start": {"launch": launch}}
    specs |= {"fetch": {**lineage.specs["fetch"], **fetch}}
    here = replace(
        lineage,
        specs=specs,
        dataset=lineage.dataset.model_copy(update={"source": fetch["source"]}),
        base=lineage.base.model_copy(update={"origin": "/home/private/bases/mine"}),
    )
    card, made = model_card(here, SPEC, "ada/tuned"), reproduction(here)
    assert "private" not in card + json.dumps(made)
    assert made["changes"]["fetch"]["source"] == "rows.csv" and made["changes"]["base"]["model"] == "mine"
    assert ["data", f"rows.csv at {lineage.dataset.revision}, 8 training and 2 validation rows"] in tables(card)[0]
    assert f"a local file or folder, `rows.csv` with the digest `{lineage.dataset.revision}`: name yours in" in card
    assert f"The base was a local file or folder, `mine` with the digest `{lineage.base.model_digest}`" in card
    rewarded = {**specs, "train": {**specs["train"], "rewards": [{"name": "exact", "weight": 1.0}]}}
    assert "private" not in json.dumps(reproduction(replace(here, specs=rewarded)))
    assert resolve(made["recipe"], made["changes"]).train.launch.launcher == "local"
    pretrained = {"base": {"corpus": "/home/private/corpus", "tokenizer": "/home/private/words", "seed": 1}}
    base = PretrainedModel(**lineage.base.model_dump(), num_steps=1, first_loss=2.0, last_loss=1.0)
    of_own = reproduction(replace(here, base=base, specs={**specs, **pretrained}))
    assert of_own["base_changes"] == {"corpus": "corpus", "tokenizer": "words", "seed": 1}


NASTY = [
    "a|b",
    "a\n---\nb",
    "a\\|b",
    "`a`",
    "``|``",
    "<script>",
    "![x](http://h/y.png)",
    "- a: b",
    "#",
    "'\"",
    "\x00",
    "",
]
NAMES = st.one_of(st.sampled_from(NASTY), st.text(max_size=40), st.text(alphabet="|`\\\n-: #'\"", max_size=20))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=NAMES, target=NAMES, origin=NAMES, license=NAMES, prompt=NAMES)
def test_no_name_breaks_the_table_or_the_front_matter(
    lineage: Lineage, source: str, target: str, origin: str, license: str, prompt: str
):
    plain = model_card(lineage, SPEC, "ada/tuned")
    specs = json.loads(json.dumps(lineage.specs))
    specs["train"]["lora"]["target_modules"] = [target]
    specs["pack"]["system_prompt"] = prompt
    strange = replace(
        lineage,
        dataset=lineage.dataset.model_copy(update={"source": source}),
        base=lineage.base.model_copy(update={"origin": origin}),
        data_card=SourceCard(license=license, languages=(license,)),
        specs=specs,
        changes=[{"tensor": target, "delta_norm": 1.0}],
    )
    card = model_card(strange, SPEC, "ada/tuned")
    found, expected = tables(card), tables(plain)
    assert [len(rows) for rows in found] == [len(e) + (i == 2) for i, e in enumerate(expected)]
    assert {len(row) for rows in found for row in rows if row} == {2}
    told = " ".join(without_folder(source).replace("\\|", "|").split())
    if told.isprintable() and "\\" not in told:
        assert told in found[0][3][1]
    front_matter = front(card)
    assert front_matter["library_name"] == "transformers"
    assert front_matter["model-index"][0]["name"] == "tuned"
    assert [t.content for t in MarkdownIt("commonmark").enable("table").parse(card) if t.type == "html_block"] == []


def test_no_token_in_what_is_published(store: ArtifactStore, merged: MergedModel, hub: HubServer):
    published = publish_model(merged, PublishSpec(repo_id="ada/tuned", what="both"), store, HfApi(hub.url, token=WRITE))
    assert published.commit
    assert not [name for name, data in hub.content("model", "ada/tuned").items() if WRITE.encode() in data]
    assert not [
        path for path in Path(published.folder).rglob("*") if path.is_file() and WRITE.encode() in path.read_bytes()
    ]
