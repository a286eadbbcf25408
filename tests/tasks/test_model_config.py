"""A config.json that leaves out, nulls or nests what estimates read is as good as one that says it."""

from typing import Any

import pytest

from tasks import model_config as subject
from tasks.specs import LoraSpec, TrainSpec
from tasks.targets import find_targets
from tasks.train.duration import step_seconds
from tasks.train.needs import require_aligned
from tasks.train.plan import StepPlan, Workload, plan_step

SIZES = {
    "num_hidden_layers": 8,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
LINEAR = {f"self_attn.{name}_proj": (1024, 1024) for name in "qkvo"}
LINEAR |= {"mlp.up_proj": (4096, 1024), "mlp.gate_proj": (4096, 1024), "mlp.down_proj": (1024, 4096)}
SHAPES = {f"model.layers.{layer}.{name}.weight": shape for layer in range(8) for name, shape in LINEAR.items()}
SHAPES |= {"model.embed_tokens.weight": (32000, 1024), "vision_tower.encoder.layers.9.mlp.fc1.weight": (9000, 7)}
SPEC = TrainSpec(lora=LoraSpec(target_modules=("7.self_attn.q_proj",)), offload_layers=-1)


def plan_of(config: dict[str, Any]) -> tuple[StepPlan, dict[str, int]]:
    targets = find_targets(SHAPES, SPEC.lora)
    work = Workload(shapes=SHAPES, config=config, spec=SPEC, targets=targets, row_tokens=2048)
    require_aligned(config, SPEC)
    plan = plan_step(work, 2_500_000_000)
    assert step_seconds(work, plan, 989e12) is None or config["model_type"] == "gpt_oss"
    return plan, work.needs(plan)


@pytest.mark.parametrize("family", ["qwen2", "gpt_oss"])
@pytest.mark.parametrize(
    "written",
    [
        {**SIZES, "num_key_value_heads": None, "head_dim": None},  # llama 1's
        {name: size for name, size in SIZES.items() if name != "num_key_value_heads"},
        {name: size for name, size in SIZES.items() if name != "intermediate_size"} | {"ffn_dim": 4096},  # OPT's
        {"text_config": SIZES},
        {"text_config": {"num_hidden_layers": 8, "hidden_size": 1024, "intermediate_size": 4096, "head_dim": 128}},
        {"head_dim": 128},
        {"experts_per_token": 1, **SIZES},
    ],
    ids=["null", "no keys", "no inner", "nested", "nested with defaults", "shapes alone", "older name"],
)
def test_the_plan_is_that_of_the_whole_config(family: str, written: dict[str, Any]):
    expected = plan_of({"model_type": family, **SIZES})
    assert plan_of(subject.complete_config({"model_type": family, **written}, SHAPES)) == expected


def test_what_the_config_says_is_not_changed():
    said = {"model_type": "gemma3", "hidden_size": 7, "text_config": {"model_type": "gemma3_text", "vocab_size": 9}}
    made = subject.complete_config(said, SHAPES)
    assert (made["model_type"], made["hidden_size"], made["vocab_size"]) == ("gemma3", 7, 9)
    assert subject.complete_config({"model_type": "x"}, {})["num_hidden_layers"] == 0
