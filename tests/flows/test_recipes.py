"""Named recipes resolve, carry what the seeds recommend, and take changes."""

from typing import get_args

import pytest

from flows import recipes as subject
from tasks.errors import SpecError
from tasks.gptoss.layout import parameter_shapes
from tasks.specs import PretrainSpec, Recipe
from tasks.train.targets import find_targets


def test_names_for_the_form_are_the_recipes():
    assert get_args(subject.RecipeName) == tuple(subject.RECIPES)
    assert get_args(subject.PretrainName) == tuple(subject.PRETRAIN_RECIPES)


@pytest.mark.parametrize("name", subject.RECIPES)
def test_recipe_resolves_alike_each_time_and_its_json_round_trips(name: str):
    recipe = subject.resolve(name)
    assert recipe == subject.resolve(name, {}) == subject.RECIPES[name]()
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert recipe.serve.host == "127.0.0.1"
    assert recipe.pack.row_tokens <= recipe.serve.max_model_len  # what is trained can be asked for


@pytest.mark.parametrize("name", subject.PRETRAIN_RECIPES)
def test_pretrain_recipe_round_trips(name: str):
    spec = subject.resolve_pretrain(name)
    assert PretrainSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec.shape.rope_factor in (1, spec.shape.context_tokens / spec.shape.initial_context_tokens)


def test_tiny_is_the_embedded_default():
    recipe = subject.resolve("tiny")
    assert (recipe.fetch.source, recipe.base.model) == ("shipped", "pretrain:tiny")
    base = subject.resolve_base(recipe)
    assert base is not None and base.shape.vocab_size == 201_088
    assert recipe.serve.max_model_len <= base.shape.context_tokens
    hits = find_targets(parameter_shapes(base.shape), recipe.train.lora)
    assert len(hits) == 6 * base.shape.num_layers


def test_20b_is_the_seeds_recommended_start():
    recipe = subject.resolve("gptoss20b_lora_h100")
    lora = recipe.train.lora
    assert (recipe.base.model, lora.rank, lora.alpha, lora.target_modules) == ("openai/gpt-oss-20b", 8, 16, ())
    assert lora.target_parameters == tuple(f"{layer}.mlp.experts.down_proj" for layer in (7, 15, 23))
    assert subject.resolve_base(recipe) is None


def test_qwen_is_qlora_on_a_dense_model():
    train = subject.resolve("qwen_qlora_16gb").train
    assert (train.quantization, train.lora.rank, train.lora.target_modules) == ("nf4", 64, ("q_proj", "v_proj"))


def test_changes_reach_any_depth_and_nothing_else():
    changed = subject.resolve("tiny", {"train": {"max_steps": 3, "lora": {"rank": 2}}})
    assert (changed.train.max_steps, changed.train.lora.rank) == (3, 2)
    back = {"train": {"max_steps": 70, "lora": {"rank": 8}}}
    original = subject.resolve("tiny")
    assert changed != original
    assert changed.train.lora.target_modules == original.train.lora.target_modules
    assert (changed.fetch, changed.pack, changed.serve) == (original.fetch, original.pack, original.serve)
    assert back["train"]["lora"]["rank"] == original.train.lora.rank


def test_unknown_names_are_answered_with_those_that_exist():
    with pytest.raises(SpecError, match=r"no recipe 'tinny': choose one of tiny, gptoss20b_lora_h100, gptoss20b"):
        subject.resolve("tinny")
    with pytest.raises(SpecError, match=r"no pretrain recipe 'huge': choose one of tiny"):
        subject.resolve_base(subject.resolve("tiny", {"base": {"model": "pretrain:huge"}}))
    with pytest.raises(SpecError, match=r"Recipe has no field train\.lr: fields here are .*learning_rate"):
        subject.resolve("tiny", {"train": {"lr": 1}})
