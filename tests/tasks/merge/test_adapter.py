"""What an adapter asks for: other kinds are refused by name, ranks and scales are those that PEFT finds."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from transformers import GptOssConfig, GptOssForCausalLM

from tasks.errors import SpecError
from tasks.gptoss.layout import config_values
from tasks.merge import adapter as subject
from tests.tiny import SHAPE

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"peft_type": "IA3"}, "adapter is of type IA3, expected LORA"),
        ({"r": None}, "has no number for r"),
        ({"use_dora": True}, "uses DoRA"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"trainable_token_indices": [1]}, "uses trainable tokens"),
        ({"layer_replication": [[0, 1]]}, "uses layer replication"),
        ({"fan_in_fan_out": True}, "uses fan_in_fan_out"),
        ({"bias": "all"}, "uses bias=all"),
        ({"lora_bias": True}, "uses a bias on lora_B"),
        ({"alora_invocation_tokens": [1, 2]}, r"uses activated LoRA \(alora_invocation_tokens\)"),
        ({"use_qalora": True}, "uses QALoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "uses block-diagonal LoRA"),
        ({"arrow_config": {"top_k": 1}}, "uses Arrow"),
        ({"kasa_config": {"beta": 1}}, "uses KaSA"),
        ({"velora_config": {"scale": 1}}, "uses VeLoRA"),
        ({"monteclora_config": {"a": 1}}, "uses MonteCLoRA"),
        ({"ensure_weight_tying": True}, "uses tied adapters"),
        ({"megatron_config": {"a": 1}}, "uses megatron_config"),
        ({"init_lora_weights": "pissa_niter_4"}, "uses init_lora_weights=pissa_niter_4, which starts from another"),
        ({"init_lora_weights": "corda"}, "uses init_lora_weights=corda"),
        ({"init_lora_weights": "mica"}, "uses init_lora_weights=mica"),
        ({"use_something_of_next_year": True}, "uses use_something_of_next_year"),
        ({"use_dora": True, "bias": "lora_only"}, "uses DoRA, bias=lora_only, which can't be merged here: use PEFT's"),
    ],
)  # fmt: skip
def test_kinds_that_are_not_plain_lora_are_refused_by_name(config: dict[str, Any], named: str):
    with pytest.raises(SpecError, match=named):
        subject.refuse_unsupported({**PLAIN, **config})


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_what_peft_writes_by_default_is_taken(start: bool | str):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=start, eva_config=None).to_dict()  # pyright: ignore
    subject.refuse_unsupported({**config, "peft_type": "LORA", "lora_dropout": 0.1, "use_rslora": True})


def test_every_field_of_pefts_config_was_looked_at():
    """A field that a newer PEFT adds must be sorted in by a person: harmless, or refused."""
    refused = {"use_dora", "modules_to_save", "fan_in_fan_out", "megatron_config", *subject._LABELS}
    names = {field.name for field in fields(LoraConfig)}
    assert names - subject._HARMLESS - refused == set()


MODULES = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "o_proj")]
PARTS = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")] + ["mlp.router.weight"]
PATTERNS = ["q_proj", "self_attn.q_proj", r"layers\.1\..*", "gate_up_proj", "mlp.experts.down_proj", "router", "weight",
            r".*experts.*", "model.layers.0.self_attn.o_proj", "proj", r"[qo]_proj", "experts"]  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 5), max_size=4),
    st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 50), max_size=4),
    st.booleans(),
    st.integers(1, 6),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_ranks_and_scales_are_those_of_peft(ranks: dict[str, int], alphas: dict[str, int], rslora: bool, rank: int):
    config = LoraConfig(
        r=rank,
        lora_alpha=12,
        use_rslora=rslora,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=["q_proj", "o_proj"],
        target_parameters=PARTS,
    )
    with torch.device("meta"):
        skeleton = GptOssForCausalLM(GptOssConfig(**config_values(SHAPE)))
    model = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    found: dict[str, tuple[int, float]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            key = name.removeprefix("base_model.model.").replace(".base_layer", "")
            key += f".{layer.parameter_name}" if isinstance(layer, ParamWrapper) else ""
            found[key] = (layer.r["default"], layer.scaling["default"])
    assert len(found) == 2 * (2 + len(PARTS))
    assert {key: subject.rank_and_scale(config.to_dict(), key) for key in found} == found
