"""Named recipes resolve, carry what the seeds recommend, and take changes."""

from typing import get_args

import pytest

from flows import recipes as subject
from tasks.errors import SpecError
from tasks.gptoss.layout import parameter_shapes
from tasks.specs import PretrainSpec, Recipe, ReinforceRecipe
from tasks.targets import find_targets


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


@pytest.mark.parametrize("name", subject.REINFORCE_RECIPES)
def test_reinforce_recipe_resolves_round_trips_and_is_checked_as_sft(name: str):
    recipe = subject.resolve_reinforce(name)
    assert recipe == subject.resolve_reinforce(name, {})
    assert ReinforceRecipe.model_validate_json(recipe.model_dump_json()) == recipe
    same = recipe.as_finetune()
    assert (same.train.lora, same.base, same.serve) == (recipe.reinforce.lora, recipe.base, recipe.serve)
    assert recipe.reinforce.max_sequence_tokens < recipe.serve.max_model_len
    changed = subject.resolve_reinforce(name, {"reinforce": {"max_steps": 2, "lora": {"rank": 4}}})
    assert (changed.reinforce.max_steps, changed.as_finetune().train.lora.rank) == (2, 4)


def test_names_of_reinforce_recipes_are_those_of_the_form_and_a_warm_start_has_the_same_adapter():
    assert get_args(subject.ReinforceName) == tuple(subject.REINFORCE_RECIPES)
    lora = subject.resolve_reinforce("tiny_grpo").reinforce.lora.model_dump()
    warm = {"lora": lora, "max_steps": 3}
    without_kl = {"warm_start": warm, "reinforce": {"beta": 0.0}}
    assert subject.resolve_reinforce("tiny_grpo", without_kl).warm_start is not None
    with pytest.raises(SpecError, match=r"beta is 0\.05 with a warm start.*set beta to 0"):
        subject.resolve_reinforce("tiny_grpo", {"warm_start": warm})
    with pytest.raises(SpecError, match="one adapter goes on in the other"):
        subject.resolve_reinforce("tiny_grpo", {"warm_start": warm | {"lora": lora | {"rank": 4}}})
    with pytest.raises(SpecError, match="rewards compare with answers"):
        subject.resolve_reinforce(
            "tiny_grpo", {"fetch": {"text_column": "t", "question_column": "", "answer_column": ""}}
        )
