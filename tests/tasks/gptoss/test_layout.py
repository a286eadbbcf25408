"""What we say of gpt-oss from its shape alone is what transformers builds."""

import pytest
from transformers import GptOssConfig

from tasks.gptoss import layout as subject
from tests.tiny import SHAPE, make_model


@pytest.mark.parametrize("tie", [False, True])
def test_parameters_are_those_of_the_built_model(tie: bool):
    import torch
    from transformers import GptOssForCausalLM

    shape = SHAPE.model_copy(update={"tie_embeddings": tie, "intermediate_size": 24, "num_layers": 3})
    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(**subject.config_values(shape)))
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert subject.parameter_shapes(shape) == built


def test_order_is_the_models():
    assert next(iter(subject.parameter_shapes(SHAPE))) == "model.embed_tokens.weight"
    assert set(subject.parameter_shapes(SHAPE)) == set(make_model().state_dict())


def test_config_carries_every_number():
    config = GptOssConfig(**subject.config_values(SHAPE))
    assert config.model_type == subject.MODEL_TYPE
    assert (config.num_local_experts, config.num_experts_per_tok, config.sliding_window) == (4, 2, 8)
    assert (config.max_position_embeddings, config.head_dim, config.vocab_size) == (512, 8, 262)
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256, "rope_theta": 150000.0}
    assert {name: config.rope_parameters[name] for name in yarn} == yarn
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}


@pytest.mark.parametrize("part", ["blocks", "scales"])
@pytest.mark.parametrize("name", subject.EXPERT_PARAMETERS)
def test_quantised_names(name: str, part: str):
    stem = f"model.layers.17.mlp.experts.{name}"
    assert subject.quantized_stem(f"{stem}_{part}") == (stem, part)
    assert subject.parameter_name(f"{stem}_{part}") == (stem if part == "blocks" else None)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.down_proj_bias", "lm_head.weight", "x.down_proj_blocks"])
def test_other_names_are_themselves(name: str):
    assert subject.quantized_stem(name) is None
    assert subject.parameter_name(name) == name
