"""A pretrained model is found by its key or as the newest of a recipe, also of a changed one."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.recipes import resolve_pretrain
from tasks.artifacts import ArtifactStore, PretrainedModel, make_key
from tasks.errors import MissingError, SpecError
from tasks.pretrain.found import find_pretrained
from tasks.specs import PretrainSpec, change

TINY, COMPACT = resolve_pretrain("tiny"), resolve_pretrain("compact_1b4")
SPECS = {"tiny": TINY, "compact_1b4": COMPACT}


def commit(store: ArtifactStore, spec: PretrainSpec, pin: str = "") -> PretrainedModel:
    with store.claim(PretrainedModel, make_key("pretrain", 1, spec, {"corpus": pin})) as claim:
        model = PretrainedModel(
            key=claim.key,
            folder=str(claim.folder),
            model_folder=str(claim.folder / "model"),
            origin=f"pretrained {claim.key[:8]}",
            model_digest="a" * 64,
            num_parameters=7,
            num_steps=1,
            first_loss=2.0,
            last_loss=1.0,
        )
        return claim.commit(model, spec=spec)


def keep_run(store: ArtifactStore, name: str, values: dict[str, Any]) -> None:
    (store.root / "runs" / name).mkdir(parents=True)
    (store.root / "runs" / name / "recipe.json").write_text(json.dumps(values))


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def test_latest_is_the_newest_of_its_recipe(store: ArtifactStore):
    first, second = commit(store, TINY), commit(store, TINY, "edited")
    commit(store, COMPACT)
    assert find_pretrained("latest", "tiny", SPECS, store) == second
    assert find_pretrained(first.key[:8], "tiny", SPECS, store) == first


def test_a_model_is_not_released_by_another_recipe(store: ArtifactStore):
    made, unknown = commit(store, TINY), commit(store, change(TINY, {"num_steps": 3}))
    with pytest.raises(SpecError, match=f"{made.short} was made by the recipe tiny, not by compact_1b4.*set recipe to"):
        find_pretrained(made.key[:8], "compact_1b4", SPECS, store)
    assert find_pretrained(unknown.key[:8], "compact_1b4", SPECS, store) == unknown  # whose run is not here any more


def test_a_changed_recipe_is_still_that_recipe(store: ArtifactStore):
    fewer, of_base = change(COMPACT, {"num_steps": 3}), change(COMPACT, {"num_steps": 4})
    made = commit(store, fewer)
    with pytest.raises(MissingError, match=rf"no pretrained model of the recipe compact_1b4 .* there are {made.short}"):
        find_pretrained("latest", "compact_1b4", SPECS, store)
    keep_run(store, "torn", {"recipe": "compact_1b4"})
    keep_run(store, "run", {"recipe": "compact_1b4", "resolved": fewer.model_dump(mode="json")})
    assert find_pretrained("latest", "compact_1b4", SPECS, store) == made
    base = commit(store, of_base)
    tuned = {"base": {"model": "pretrain:compact_1b4"}}
    keep_run(store, "b", {"recipe": "mine", "resolved": tuned, "pretraining": of_base.model_dump(mode="json")})
    assert find_pretrained("latest", "compact_1b4", SPECS, store) == base
    with pytest.raises(MissingError, match="no pretrained model of the recipe tiny"):
        find_pretrained("latest", "tiny", SPECS, store)


def test_what_fits_several_or_none_is_said(store: ArtifactStore):
    with pytest.raises(MissingError, match=r"'abc' below .*: there are none. Make one with"):
        find_pretrained("abc", "tiny", SPECS, store)
    models = [commit(store, TINY, str(number)) for number in range(17)]  # two begin with the same digit
    digits = [model.key[0] for model in models]
    twice = next(digit for digit in digits if digits.count(digit) > 1)
    with pytest.raises(SpecError, match="give more digits of the key"):
        find_pretrained(twice, "tiny", SPECS, store)
