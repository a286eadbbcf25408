"""A model of PPO is found by its key or as the newest of a recipe's base, never released by another's recipe."""

from pathlib import Path

import pytest

from tasks.artifacts import ArtifactStore, ReinforcedModel, make_key
from tasks.errors import MissingError, SpecError
from tasks.ppo.found import find_reinforced
from tasks.specs import BaseModelSpec, PpoSpec

LLAMA, QWEN = BaseModelSpec(model="meta-llama/Llama-3.2-1B-Instruct"), BaseModelSpec(model="Qwen/Qwen2.5-0.5B-Instruct")
SPEC = PpoSpec()


def commit(store: ArtifactStore, origin: str, pin: str = "") -> ReinforcedModel:
    """Commit a model without weights; its base and questions are not there, as when they were cleared away."""
    with store.claim(ReinforcedModel, make_key("ppo", 1, SPEC, {"base": origin + pin})) as claim:
        model = ReinforcedModel(
            key=claim.key,
            folder=str(claim.folder),
            parents=("questions/" + "0" * 64, "base/" + "1" * 64),
            model_folder=str(claim.folder / "model"),
            origin=f"PPO {claim.key[:8]} of {origin}",
            model_digest="a" * 64,
            num_parameters=7,
            base_folder="/base",
            base_digest="b" * 64,
            num_steps=1,
            test_score_before=None,
            test_score_after=None,
        )
        return claim.commit(model, spec=SPEC)


def test_latest_is_the_newest_of_the_recipes_base(tmp_path: Path):
    store, folder = ArtifactStore(tmp_path / "home"), tmp_path / "a base@home of mine"
    first, second = commit(store, f"{LLAMA.model}@0123"), commit(store, f"{LLAMA.model}@4567")
    tiny, own = commit(store, f"{QWEN.model}@89ab"), commit(store, str(folder))
    assert find_reinforced("latest", LLAMA, store) == second
    assert find_reinforced(first.key[:12], LLAMA, store) == first
    assert find_reinforced("latest", QWEN, store) == tiny
    assert find_reinforced("latest", BaseModelSpec(model=str(folder)), store) == own
    with pytest.raises(MissingError, match=rf"no reinforced model of some/other below .*: there are {first.short} \("):
        find_reinforced("latest", BaseModelSpec(model="some/other"), store)


def test_a_model_of_another_base_is_refused(tmp_path: Path):
    store = ArtifactStore(tmp_path)
    tiny = commit(store, f"{QWEN.model}@89ab")
    with pytest.raises(
        SpecError, match=rf"{tiny.short} was made of {QWEN.model}@89ab, not of meta-llama/.*, the recipe's"
    ):
        find_reinforced(tiny.key[:12], LLAMA, store)


@pytest.mark.parametrize("name", ["", "xyz"])
def test_what_fits_none_is_said(tmp_path: Path, name: str):
    with pytest.raises(MissingError, match=rf"no reinforced model '{name}' below .*: there are none. Make one with"):
        find_reinforced(name, LLAMA, ArtifactStore(tmp_path))


def test_what_fits_several_is_said(tmp_path: Path):
    store = ArtifactStore(tmp_path)
    digits = [commit(store, LLAMA.model, str(number)).key[0] for number in range(17)]
    twice = next(digit for digit in digits if digits.count(digit) > 1)
    with pytest.raises(SpecError, match=rf"reinforced '{twice}' may be .*: give more digits of the key"):
        find_reinforced(twice, LLAMA, store)
