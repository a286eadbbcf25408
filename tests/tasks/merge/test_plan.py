"""Every adapter tensor finds its base tensor, or the fault is named before a weight is read."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import ShapeError, SpecError
from tasks.merge import plan as subject

E, HIDDEN, INNER, R = 4, 64, 32, 2
EXPERTS = "model.layers.0.mlp.experts"
QUERY = "model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": R,
    "lora_alpha": 6,
    "bias": "none",
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


def _header(*shape: int) -> dict[str, Any]:
    return {"dtype": "BF16", "shape": list(shape), "data_offsets": [0, 0]}


BASE = {
    "model.embed_tokens.weight": _header(100, HIDDEN),
    f"{QUERY}.weight": _header(48, HIDDEN),
    f"{QUERY}.bias": _header(48),
    f"{EXPERTS}.gate_up_proj": _header(E, HIDDEN, 2 * INNER),
    f"{EXPERTS}.gate_up_proj_bias": _header(E, 2 * INNER),
    f"{EXPERTS}.down_proj": _header(E, INNER, HIDDEN),
}
QUANTIZED = {name: header for name, header in BASE.items() if not name.endswith("down_proj")} | {
    f"{EXPERTS}.down_proj_blocks": _header(E, HIDDEN, INNER // 32, 16) | {"dtype": "U8"},
    f"{EXPERTS}.down_proj_scales": _header(E, HIDDEN, INNER // 32) | {"dtype": "U8"},
}


def _pair(module: str, nesting: int, a: tuple[int, int], b: tuple[int, int]) -> dict[str, Any]:
    stem = f"base_model.model.{module}" + ".base_layer" * nesting
    return {f"{stem}.lora_A.weight": _header(*a), f"{stem}.lora_B.weight": _header(*b)}


LINEAR = _pair(QUERY, 0, (R, HIDDEN), (48, R))
GATE_UP = _pair(EXPERTS, 1, (E * R, HIDDEN), (2 * INNER, E * R))
DOWN = _pair(EXPERTS, 0, (E * R, INNER), (HIDDEN, E * R))
SWAPPED = {
    **_pair(EXPERTS, 0, (E * R, HIDDEN), (2 * INNER, E * R)),
    **_pair(EXPERTS, 1, (E * R, INNER), (HIDDEN, E * R)),
}
ADAPTER = {**LINEAR, **GATE_UP, **DOWN}


def _plan(base: Any = BASE, adapter: Any = ADAPTER, shard_bytes: int = 10**9, **config: Any) -> subject.MergePlan:
    return subject.plan_merge(
        base, adapter, {**CONFIG, **config}, dtype="BF16", experts="plain", shard_bytes=shard_bytes
    )


def _changes(plan: subject.MergePlan) -> dict[str, str]:
    return {output.name: output.change.a_key for output in plan.outputs if output.change}


def test_each_pair_finds_its_tensor_and_nesting_tells_experts_apart():
    """PEFT wraps gate_up_proj first, so it lies innermost, under one more .base_layer."""
    assert _changes(_plan()) == {
        f"{QUERY}.weight": f"base_model.model.{QUERY}.lora_A.weight",
        f"{EXPERTS}.gate_up_proj": f"base_model.model.{EXPERTS}.base_layer.lora_A.weight",
        f"{EXPERTS}.down_proj": f"base_model.model.{EXPERTS}.lora_A.weight",
    }


def test_one_targeted_parameter_has_no_nesting():
    only = _pair(EXPERTS, 0, (E * R, INNER), (HIDDEN, E * R))
    plan = _plan(adapter=only, target_parameters=["0.mlp.experts.down_proj"])
    assert list(_changes(plan)) == [f"{EXPERTS}.down_proj"]


def test_real_peft_keys_and_order(tmp_path):
    from peft import LoraConfig, get_peft_model

    from tasks.files import read_json
    from tasks.merge.reader import Reader
    from tests.tiny import make_model

    targets = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=targets)
    make_model().save_pretrained(tmp_path / "base")
    get_peft_model(make_model(), config).save_pretrained(tmp_path / "adapter")
    with Reader.opened(tmp_path / "base") as opened, Reader.opened(tmp_path / "adapter") as given:
        base, adapter = opened.headers, given.headers
    stored = read_json(tmp_path / "adapter/adapter_config.json")
    plan = subject.plan_merge(base, adapter, stored, dtype="BF16", experts="plain", shard_bytes=10**9)
    changed = {output.name: output.change for output in plan.outputs if output.change}
    assert sorted(changed) == sorted(
        f"model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("self_attn.q_proj.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    )
    assert {key for change in changed.values() for key in (change.a_key, change.b_key)} == set(adapter)
    assert [change.scale for change in changed.values()] == [2.0] * 6


def test_quantised_base_gives_the_plain_tensor():
    outputs = {output.name: output for output in _plan(base=QUANTIZED).outputs}
    down = outputs[f"{EXPERTS}.down_proj"]
    assert down.shape == (E, INNER, HIDDEN)
    assert [source.name for source in down.sources] == [f"{EXPERTS}.down_proj_blocks", f"{EXPERTS}.down_proj_scales"]
    assert [(stored.name, stored.dtype) for stored in down.stored] == [(f"{EXPERTS}.down_proj", "BF16")]
    assert down.change is not None and not down.is_copied
    assert set(outputs) == set(BASE)
    assert len(outputs[f"{EXPERTS}.gate_up_proj"].sources) == 1


def test_scale_follows_the_config():
    scales = {output.change.scale for output in _plan().outputs if output.change}
    assert scales == {3.0}
    scales = [output.change.scale for output in _plan(use_rslora=True).outputs if output.change]
    assert scales == pytest.approx([6 / 2**0.5] * 3)


def _without(name: str, headers: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in headers.items() if not key.endswith(name)}


@pytest.mark.parametrize(
    ("base", "adapter", "message"),
    [
        (BASE, {**ADAPTER, "base_model.model.lm_head.weight": _header(1)}, "base_model.model.lm_head.weight is no"),
        (BASE, _without(f"{QUERY}.lora_B.weight", ADAPTER), rf"has .*{QUERY}\.lora_A\.weight without its lora_B"),
        (BASE, _without(f"{QUERY}.lora_A.weight", ADAPTER), rf"has .*{QUERY}\.lora_B\.weight without its lora_A"),
        (BASE, {}, "adapter holds no LoRA tensors: the merged model would be the base"),
        (BASE, _pair("model.layers.9.self_attn.q_proj", 0, (R, HIDDEN), (48, R)), r"pairs on .*layers\.9.*0 t"),
        ({**BASE, f"{QUERY}.weight": _header(48, 32)}, LINEAR, r"q_proj.*A is \[2, 64\], .* expected \[2, 32\]"),
        (BASE, _pair(QUERY, 0, (R + 1, HIDDEN), (48, R + 1)), "it was trained on another base"),
        (_without("down_proj", BASE), {**GATE_UP, **DOWN}, r"has 2 LoRA pairs on .* but the base has 1 targeted"),
        (BASE, DOWN, r"has 1 LoRA pairs on model\.layers\.0\.mlp\.experts but the base has 2 targeted"),
        (BASE, SWAPPED, "does not fit"),
        (_without("_scales", QUANTIZED), ADAPTER, r"base has .*down_proj_blocks without .*down_proj_scales: download"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(base: Any, adapter: Any, message: str):
    with pytest.raises(ShapeError, match=message):
        _plan(base=base, adapter=adapter)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 60))
def test_shards_keep_order_and_size(sizes: list[int], capacity: int):
    stored = [subject.Stored(name=str(index), dtype="BF16", shape=(size,)) for index, size in enumerate(sizes)]
    outputs = [subject.Output(name=s.name, shape=s.shape, sources=(s,), stored=(s,), change=None) for s in stored]
    shards = subject._shards(outputs, 2 * capacity)
    assert [output for shard in shards for output in shard] == outputs
    assert all(sum(o.num_bytes for o in shard) <= 2 * capacity or len(shard) == 1 for shard in shards)
    for shard, following in pairwise(shards):  # no shard could have taken the next tensor
        assert sum(o.num_bytes for o in shard) + following[0].num_bytes > 2 * capacity
    plan = subject.MergePlan(shards=shards)
    assert (plan.total_bytes, plan.outputs) == (2 * sum(sizes), outputs)
    assert all(output.is_copied for output in plan.outputs)


def test_mxfp4_output_is_named_and_laid_out_as_gpt_oss_stores_it():
    plan = subject.plan_merge(QUANTIZED, LINEAR, CONFIG, dtype="BF16", experts="mxfp4", shard_bytes=10**9)
    stored = {tensor.name: (tensor.dtype, tensor.shape) for output in plan.outputs for tensor in output.stored}
    assert stored[f"{EXPERTS}.down_proj_blocks"] == ("U8", (E, HIDDEN, INNER // 32, 16))
    assert stored[f"{EXPERTS}.gate_up_proj_blocks"] == ("U8", (E, 2 * INNER, HIDDEN // 32, 16))
    assert stored[f"{EXPERTS}.gate_up_proj_scales"] == ("U8", (E, 2 * INNER, HIDDEN // 32))
    assert stored[f"{EXPERTS}.gate_up_proj_bias"] == ("BF16", (E, 2 * INNER))
    copied = {output.name for output in plan.outputs if output.is_copied}
    assert f"{EXPERTS}.down_proj" in copied  # MXFP4 before, and not touched
    assert copied == {output.name for output in plan.outputs} - {f"{QUERY}.weight", f"{EXPERTS}.gate_up_proj"}
    widths = [subject.ELEMENT_BYTES[tensor.dtype] for output in plan.outputs for tensor in output.stored]
    assert widths == sorted(widths, reverse=True)  # an odd number of bytes must not shift a wider tensor


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({f"{QUERY}.weight": _header(48, HIDDEN)}, "mxfp4 but the base has no fused experts"),
        ({**BASE, f"{EXPERTS}.down_proj": _header(E, 40, HIDDEN)}, r"down_proj \(4, 40, 64\) has no multiple of 32"),
        ({**BASE, "a": {**_header(3), "dtype": "F8_E4M3"}}, "base tensor a is of type F8_E4M3: name its bf16"),
    ],
)
def test_a_base_that_can_not_be_stored_so_is_named(base: Any, message: str):
    with pytest.raises(SpecError, match=message):
        subject.plan_merge(base, LINEAR, CONFIG, dtype="BF16", experts="mxfp4", shard_bytes=10**9)


def test_integers_stay_what_they_are():
    base = {**BASE, "counts": {**_header(7), "dtype": "I64"}, "half": {**_header(7), "dtype": "F16"}}
    outputs = {output.name: output for output in _plan(base=base).outputs}
    assert outputs["counts"].is_copied and outputs["counts"].stored[0].dtype == "I64"
    assert not outputs["half"].is_copied and outputs["half"].stored[0].dtype == "BF16"


def test_plan_is_cut_into_shards_and_counts_bytes():
    plan = _plan(shard_bytes=20_000)
    assert len(plan.shards) == 3
    assert plan.total_bytes == 2 * (100 * 64 + 48 * 64 + 48 + E * 64 * 64 + E * 64 + E * 32 * 64)
    assert subject.shard_names(3)[0] == "model-00001-of-00003.safetensors"
