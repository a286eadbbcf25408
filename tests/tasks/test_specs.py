"""Knobs: changes touch what was named and nothing else, and each fault is said by name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks import specs as subject
from tasks.errors import SpecError
from tasks.specs import FetchSpec, LoraSpec, PackSpec, PublishSpec, Recipe, ServeSpec, TrainSpec

RECIPE = Recipe(
    base=subject.BaseModelSpec(model="owner/name"),
    fetch=FetchSpec(source="x.jsonl"),
    train=TrainSpec(lora=LoraSpec(rank=4, alpha=6, target_modules=("q_proj",))),
)


@given(st.integers(1, 10**6), st.floats(1e-9, 1.0), st.integers(0, 100))
def test_change_replaces_the_named_fields_only(row_tokens: int, rate: float, seed: int):
    changed = subject.change(
        RECIPE, {"pack": {"row_tokens": row_tokens}, "train": {"learning_rate": rate, "seed": seed}}
    )
    assert (changed.pack.row_tokens, changed.train.learning_rate, changed.train.seed) == (row_tokens, rate, seed)
    back = {"pack": {"row_tokens": RECIPE.pack.row_tokens}, "train": {"learning_rate": 2e-4, "seed": 0}}
    assert subject.change(changed, back) == RECIPE


@given(st.dictionaries(st.sampled_from(["row_tokens", "rank"]), st.integers(1, 999)))
def test_form_and_plain_values_change_alike(values: dict[str, int]):
    plain: dict[str, dict[str, object]] = {}
    if "row_tokens" in values:
        plain["pack"] = {"row_tokens": values["row_tokens"]}
    if "rank" in values:
        plain["train"] = {"lora": {"rank": values["rank"]}}
    form = subject.RecipeChanges.model_validate(plain)
    assert subject.change(RECIPE, form) == subject.change(RECIPE, plain)


def test_nothing_typed_changes_nothing():
    assert subject.change(RECIPE, subject.RecipeChanges()) == RECIPE == subject.change(RECIPE, None)


def test_false_and_zero_are_changes_and_not_gaps():
    changed = subject.change(RECIPE, subject.RecipeChanges.model_validate({"pack": {"packing": False}}))
    assert changed.pack.packing is False and RECIPE.pack.packing is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pack": {"row_tokens": -3}}, r"Recipe\.pack\.row_tokens = -3: Input should be greater than 0"),
        ({"pack": {"rows": 3}}, r"Recipe has no field pack\.rows: fields here are .*row_tokens.*system_prompt"),
        (
            {"pakc": {}},
            r"Recipe has no field pakc: fields here are base, evaluate, fetch, merge, pack, promote, publish",
        ),
        ({"train": {"lora": {"rnak": 8}}}, r"no field train\.lora\.rnak: .*rank, rslora"),
        ({"train": {"max_steps": 0}}, "max_steps is 0: nothing would be trained; use -1"),
        ({"train": {"quantization": "nf5"}}, r"train\.quantization = 'nf5': Input should be 'none', 'nf4' or 'int8'"),
        ({"serve": {"vllm_port": 8001}}, "vllm_port and gateway_port are both 8001: choose two ports"),
        ({"publish": {"repo_id": "no owner"}}, "repo_id 'no owner' is not owner/name"),
        ({"fetch": {"question_column": "q"}}, "question_column and answer_column come together"),
        (
            {"fetch": {"question_column": "q", "answer_column": "a", "text_column": "t"}},
            "text_column excludes question_column/answer_column",
        ),
        ({"train": {"lora": {"target_modules": ()}}}, "both are empty"),
        ({"train": {"lora": {"target_parameters": ("x",), "dropout": 0.1}}}, r"dropout=0\.1 can't be used"),
        ({"pack": {"prompt_date": "today"}}, r"prompt_date = 'today'"),
    ],
)
def test_wrong_change_names_field_value_and_expectation(changes: dict[str, object], message: str):
    with pytest.raises(SpecError, match=message):
        subject.change(RECIPE, changes)


def test_every_fault_is_in_one_error():
    with pytest.raises(SpecError) as caught:
        subject.change(RECIPE, {"pack": {"row_tokens": 0}, "verify": {"num_answers": 0}, "merge": {"shards": 1}})
    assert [
        name in str(caught.value) for name in ("pack.row_tokens = 0", "verify.num_answers = 0", "merge.shards")
    ] == [True] * 3


def test_specs_are_frozen_and_json_round_trips():
    with pytest.raises(ValidationError, match="frozen"):
        RECIPE.pack.row_tokens = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert Recipe.model_validate_json(RECIPE.model_dump_json()) == RECIPE


@given(st.integers(1, 512), st.integers(1, 512))
def test_lora_scale(rank: int, alpha: int):
    plain = LoraSpec(rank=rank, alpha=alpha, target_modules=("q",))
    assert subject.lora_scale(plain) == alpha / rank
    rslora = subject.lora_scale(plain.model_copy(update={"rslora": True}))
    assert rslora**2 == pytest.approx(alpha**2 / rank)


def test_base_names():
    names = ("pretrain:tiny", "openai/gpt-oss-20b", "/models/pretrain:x")
    assert [subject.BaseModelSpec(model=name).pretrain_recipe for name in names] == ["tiny", None, None]


def test_loopback_unless_told_otherwise():
    assert (ServeSpec().host, ServeSpec().vllm_port, ServeSpec().gateway_port) == ("127.0.0.1", 8000, 8001)
    assert PublishSpec().private is True
    assert PackSpec().loss_on == "assistant"


def test_serving_host_is_an_address():
    for host in ("127.0.0.1", "0.0.0.0", "::1", "localhost"):
        assert ServeSpec(host=host).host == host
    with pytest.raises(SpecError, match=r"Recipe\.serve\.host = 'my-laptop': expected an IP address of this machine"):
        subject.change(RECIPE, {"serve": {"host": "my-laptop"}})


@pytest.mark.parametrize("words", ["--api-key sk-1", "--api-key=sk-1", "--api_key sk-1", "--hf-token sk-1"])
def test_key_in_extra_args_is_refused_and_not_repeated(words: str):
    with pytest.raises(SpecError, match="set VLLM_API_KEY") as caught:
        subject.change(RECIPE, {"serve": {"extra_args": ["--seed", "1", *words.split()]}})
    assert "sk-1" not in str(caught.value)
    assert ServeSpec(extra_args=("--api-server-count", "2")).extra_args == ("--api-server-count", "2")
