"""The settings cell becomes a recipe: every name arrives in its field, and what is wrong is named."""

from pathlib import Path
from typing import Any

import pytest

from flows import notebook_settings as subject
from flows.recipes import resolve
from tasks.errors import SpecError

SEED = {  # the template of the Colab seed, as it stands there
    "PROJECT_NAME": "gpt-oss-120b-lora-demo",
    "BASE_SAVE_DIR": "/content/drive/MyDrive/llm-finetune",
    "BASE_MODEL_ID": "Qwen/Qwen2-7B",
    "USE_4BIT": True,
    "DATASET_ID": "iac/ja-wiki-2023",
    "DATASET_SPLIT": "train",
    "TEXT_COLUMN": "text",
    "MAX_SEQ_LENGTH": 1024,
    "PACKING": True,
    "LORA_R": 64,
    "LORA_ALPHA": 16,
    "LORA_DROPOUT": 0.05,
    "LORA_TARGET_MODULES": ["q_proj", "v_proj"],
    "BATCH_SIZE": 1,
    "GRADIENT_ACCUMULATION_STEPS": 16,
    "LEARNING_RATE": 2e-4,
    "NUM_TRAIN_EPOCHS": 2,
    "WARMUP_STEPS": 100,
    "LOGGING_STEPS": 10,
    "SAVE_STEPS": 500,
    "MAX_STEPS": -1,
}


def test_the_seeds_template_is_taken_as_it_stands():
    recipe = subject.recipe_from_settings(SEED)
    train = recipe.train
    assert recipe.base.model == "Qwen/Qwen2-7B"
    assert (recipe.fetch.source, recipe.fetch.split, recipe.fetch.text_column) == ("iac/ja-wiki-2023", "train", "text")
    assert (recipe.pack.row_tokens, recipe.pack.packing, recipe.pack.loss_on) == (1024, True, "all")
    assert (train.lora.rank, train.lora.alpha, train.lora.dropout) == (64, 16, 0.05)
    assert (train.lora.target_modules, train.quantization) == (("q_proj", "v_proj"), "nf4")
    assert (train.rows_per_device, train.gradient_accumulation, train.learning_rate) == (1, 16, 2e-4)
    assert (train.num_epochs, train.warmup_steps, train.max_steps) == (2, 100, -1)
    assert (train.log_steps, train.save_steps) == (10, 500)
    assert recipe.serve.served_model_name == "gpt-oss-120b-lora-demo"
    assert (recipe.publish.what, recipe.publish.repo_id) == ("adapter", "")
    assert subject.output_folder(SEED) == Path("/content/drive/MyDrive/llm-finetune/gpt-oss-120b-lora-demo")


OTHER: dict[str, Any] = {  # of each setting another value than the recipe's, and what its field is then
    "PROJECT_NAME": ("p", "p"),
    "BASE_MODEL_ID": ("a/b", "a/b"),
    "USE_4BIT": (False, "none"),
    "DATASET_ID": ("c/d", "c/d"),
    "DATASET_SPLIT": ("s", "s"),
    "TEXT_COLUMN": ("t", "t"),
    "MAX_SEQ_LENGTH": (64, 64),
    "PACKING": (False, False),
    "LORA_R": (2, 2),
    "LORA_ALPHA": (3, 3),
    "LORA_DROPOUT": (0, 0.0),
    "LORA_TARGET_MODULES": (["k_proj"], ("k_proj",)),
    "BATCH_SIZE": (7, 7),
    "GRADIENT_ACCUMULATION_STEPS": (9, 9),
    "LEARNING_RATE": (1e-3, 1e-3),
    "NUM_TRAIN_EPOCHS": (5, 5.0),
    "WARMUP_STEPS": (6, 6),
    "LOGGING_STEPS": (11, 11),
    "SAVE_STEPS": (12, 12),
    "MAX_STEPS": (13, 13),
    "HUB_REPO_ID": ("me/it", "me/it"),
}


@pytest.mark.parametrize("name", OTHER)
def test_each_setting_arrives_in_its_field(name: str):
    """One at a time: two that were mixed up would be seen."""
    given, expected = OTHER[name]
    value: Any = subject.recipe_from_settings({name: given})
    for part in subject.SETTINGS[name][2].split("."):
        value = getattr(value, part)
    assert value == expected


def test_all_names_are_the_seeds_and_two_of_ours():
    assert list(subject.SETTINGS) == [*SEED, "HUB_REPO_ID", "CHANGES"]
    assert {*OTHER, "BASE_SAVE_DIR", "CHANGES"} == {*subject.SETTINGS}


def test_what_is_left_out_keeps_the_recipes_value_and_changes_win():
    recipe, named = subject.recipe_from_settings({}), resolve("qwen_qlora_16gb")
    assert (recipe.train, recipe.pack, recipe.base) == (named.train, named.pack, named.base)
    changed = subject.recipe_from_settings({"LORA_R": 4, "CHANGES": {"train": {"lora": {"rank": 2}, "seed": 5}}})
    assert (changed.train.lora.rank, changed.train.seed) == (2, 5)


def test_a_long_row_can_be_served():
    assert subject.recipe_from_settings({"MAX_SEQ_LENGTH": 8192}).serve.max_model_len > 8192


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"LORA_RANK": 8}, r"^there is no setting LORA_RANK: did you mean LORA_R, LORA_ALPHA\?$"),
        ({"lora_r": 8}, r"did you mean LORA_R"),
        ({"XYZ": 8}, r"there is no setting XYZ: settings are PROJECT_NAME, BASE_SAVE_DIR, "),
        ({"BATCH_SIZE": "1", "USE_4BIT": 1}, r"BATCH_SIZE = '1': expected 1; USE_4BIT = 1: expected True"),
        ({"LORA_R": True}, r"LORA_R = True: expected 64"),
        ({"MAX_STEPS": 1.5}, r"MAX_STEPS = 1\.5: expected -1"),
        ({"LORA_TARGET_MODULES": "q_proj"}, r"LORA_TARGET_MODULES = 'q_proj': expected \[\"q_proj\", \"v_proj\"\]"),
        ({"LORA_TARGET_MODULES": ["q_proj", 3]}, r"LORA_TARGET_MODULES = \['q_proj', 3\]: expected"),
        ({"MAX_SEQ_LENGTH": 0}, r"MAX_SEQ_LENGTH \(Recipe\.pack\.row_tokens\) = 0: Input should be greater than 0"),
        ({"MAX_STEPS": 0}, r"MAX_STEPS .* = 0: .*use -1 for whole epochs"),
        ({"HUB_REPO_ID": "me"}, r"HUB_REPO_ID .*'me' is not owner/name"),
        ({"CHANGES": {"fetch": {"max_row": 3}}}, r"no field fetch\.max_row: fields here are answer_column"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_right(settings: dict[str, Any], message: str):
    with pytest.raises(SpecError, match=message):
        subject.recipe_from_settings(settings)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", 3])
def test_a_project_name_that_is_no_folder_is_refused(name: Any):
    with pytest.raises(SpecError, match=r"PROJECT_NAME = .*: expected the name of one folder"):
        subject.output_folder({**SEED, "PROJECT_NAME": name})


def test_a_save_folder_may_be_named_from_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert subject.output_folder({"PROJECT_NAME": "p", "BASE_SAVE_DIR": "~/tuned"}) == Path("/home/ada/tuned/p")


def test_a_save_folder_that_is_missing_is_refused():
    with pytest.raises(SpecError, match="BASE_SAVE_DIR = ''"):
        subject.output_folder({"PROJECT_NAME": "p"})
