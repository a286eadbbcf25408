"""Targets hit what PEFT would hit; one that hits nothing is an error that lists what exists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import targets as subject
from tasks.errors import SpecError
from tasks.gptoss.layout import parameter_shapes
from tasks.specs import LoraSpec
from tests.tiny import SHAPE

SHAPES = parameter_shapes(SHAPE)


def _lora(modules: tuple[str, ...] = (), parameters: tuple[str, ...] = (), rank: int = 3) -> LoraSpec:
    return LoraSpec(rank=rank, target_modules=modules, target_parameters=parameters)


@pytest.mark.parametrize(
    ("modules", "parameters"),
    [
        (("q_proj", "o_proj"), ()),
        (("1.self_attn.k_proj",), ("mlp.experts.down_proj",)),
        ((), ("0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj")),
        (("q_proj", "self_attn.q_proj"), ("experts.down_proj", "1.mlp.experts.down_proj")),
    ],
)
def test_hits_and_their_sizes_are_pefts(modules: tuple[str, ...], parameters: tuple[str, ...]):
    from peft import LoraConfig, get_peft_model

    from tests.tiny import make_model

    targets = subject.find_targets(SHAPES, _lora(modules, parameters))
    config = LoraConfig(r=3, target_modules=list(modules) or None, target_parameters=list(parameters) or None)
    model = get_peft_model(make_model(), config)
    assert sum(target.num_trainable for target in targets) == model.get_nb_trainable_parameters()[0]
    wrapped = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(wrapped) == len(targets)


def test_names_in_order_of_targets():
    names = [target.name for target in subject.find_targets(SHAPES, _lora(("v_proj",), ("1.mlp.experts.down_proj",)))]
    assert names == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.experts.down_proj",
    ]


def test_7_is_not_17():
    shapes = {f"model.layers.{layer}.mlp.experts.down_proj": (4, 8, 8) for layer in range(24)}
    found = subject.find_targets(shapes, _lora((), ("7.mlp.experts.down_proj",)))
    assert [target.name for target in found] == ["model.layers.7.mlp.experts.down_proj"]


@given(st.lists(st.sampled_from(["a", "b", "proj", "7", "17"]), min_size=1, max_size=4), st.integers(0, 4))
def test_a_hit_is_a_whole_ending_of_parts(parts: list[str], cut: int):
    name = ".".join(parts)
    target = ".".join(parts[cut:])
    assert subject.is_hit(name, target) is (cut < len(parts)) or not target
    assert not subject.is_hit(f"x{name}", name)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            _lora(("q_porj",)),
            r"LoraSpec\.target_modules 'q_porj' hits nothing; did you mean q_proj.*existing names end in "
            r"k_proj, o_proj, q_proj, v_proj in 2 layers",
        ),
        (
            _lora(("q_proj",), ("mlp.experts.down_prj",)),
            r"target_parameters 'mlp\.experts\.down_prj' hits nothing; did you mean mlp\.experts\.down_proj.*"
            r"existing names end in down_proj, gate_up_proj in 2 layers",
        ),
        (_lora((), ("7.mlp.experts.down_proj",)), r"'7\.mlp\.experts\.down_proj' hits nothing; did you mean"),
        (_lora(("embed_tokens",)), "'embed_tokens' hits nothing"),
        (_lora(("mlp.experts.down_proj",)), r"target_modules 'mlp\.experts\.down_proj' hits nothing"),
        (_lora((), ("q_proj",)), "target_parameters 'q_proj' hits nothing"),
    ],
)
def test_target_that_hits_nothing_is_named_with_what_exists(lora: LoraSpec, message: str):
    with pytest.raises(SpecError, match=message):
        subject.find_targets(SHAPES, lora)


def test_dense_base_has_no_expert_tensors():
    with pytest.raises(SpecError, match="hits nothing; the base has no such weights"):
        subject.find_targets({"model.layers.0.q_proj.weight": (4, 8)}, _lora((), ("mlp.experts.down_proj",)))
