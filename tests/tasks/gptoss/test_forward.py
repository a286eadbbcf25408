"""Our kernels below transformers' gpt-oss and PEFT's adapters: the same model, and PEFT's own files."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from tasks.errors import ShapeError
from tasks.gptoss.documents import separate_documents
from tasks.gptoss.forward import factor_experts, find_decoder, flash_attention, fuse_norms, join_layers
from tasks.gptoss.product import Era
from tests.tiny import make_model

IDS = torch.arange(60)[None] * 4 % 256
POSITIONS = torch.tensor([[*range(25), *range(35)]])
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
CONFIGS = {
    "experts and attention": {"target_parameters": list(EXPERTS), "target_modules": ["q_proj", "o_proj"]},
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "experts, k and v, other ranks": {
        "target_parameters": list(EXPERTS),
        "target_modules": ["k_proj", "v_proj"],
        "rank_pattern": {"v_proj": 5},
    },
    "one layer, down only": {"target_parameters": ["1.mlp.experts.down_proj"], "target_modules": []},
    "rslora": {"target_parameters": list(EXPERTS), "target_modules": [], "use_rslora": True},
}


def adapted(settings: dict[str, Any], seed: int = 1) -> PeftModel:
    """A tiny gpt-oss with an adapter whose both halves are not zero."""
    model = make_model(0)
    peft = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, **settings))
    torch.manual_seed(seed)
    for name, weight in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return peft


def with_kernels(model: PeftModel, *, flash: bool = True, join: bool = True, **options: Any) -> PeftModel:
    factor_experts(model, **options)
    fuse_norms(model)
    flash_attention(model) if flash else separate_documents(model)
    if flash and join:
        join_layers(model)
    return model


def stock(model: PeftModel) -> PeftModel:
    separate_documents(model)
    return model


def run(model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = model(input_ids=IDS, position_ids=POSITIONS).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:]).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def require_same(ours: Any, pefts: Any) -> None:
    """Logits, and the gradient of each weight that has one."""
    torch.testing.assert_close(ours[0], pefts[0], rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == pefts[1].keys() and ours[1]
    for name, gradient in ours[1].items():
        scale = pefts[1][name].abs().max()
        torch.testing.assert_close(gradient / scale, pefts[1][name] / scale, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize(
    "options",
    [{}, {"join": False}, {"flash": False}, {"num_recomputed": 1}, {"num_shelved": 9}, {"extended_from": None}],
    ids=["all", "apart", "eager", "recompute", "shelf", "plain"],
)
def test_value_and_gradients_are_pefts(settings: dict[str, Any], options: dict[str, Any]):
    expected = run(stock(adapted(settings)))
    require_same(run(with_kernels(adapted(settings), **options)), expected)


def test_switched_off_adapters_leave_the_base():
    model = with_kernels(adapted(CONFIGS["rslora"]))
    base = make_model(0)
    separate_documents(base)
    with model.disable_adapter():
        ours = model(input_ids=IDS, position_ids=POSITIONS).logits
    torch.testing.assert_close(ours, base(input_ids=IDS, position_ids=POSITIONS).logits, rtol=1e-5, atol=1e-5)


def test_an_adapter_saved_under_our_kernels_is_pefts_and_back(tmp_path: Path):
    settings = CONFIGS["experts and attention"]
    ours = with_kernels(adapted(settings))
    expected = run(ours)[0]
    ours.save_pretrained(tmp_path / "ours")
    stock(adapted(settings)).save_pretrained(tmp_path / "peft")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft")]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        torch.testing.assert_close(tensor, files[1][name], rtol=0, atol=0)
    by_peft = stock(PeftModel.from_pretrained(make_model(0), str(tmp_path / "ours")))
    torch.testing.assert_close(run_logits(by_peft), expected, rtol=1e-5, atol=1e-5)
    by_us = with_kernels(PeftModel.from_pretrained(make_model(0), str(tmp_path / "peft"), is_trainable=True))
    torch.testing.assert_close(run(by_us)[0], expected, rtol=1e-5, atol=1e-5)


def run_logits(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, position_ids=POSITIONS).logits


def test_a_step_of_the_optimizer_is_seen_by_the_next_pass():
    """B is copied behind the weights at each pass: a stale copy would train nothing."""
    model, reference = with_kernels(adapted(CONFIGS["rslora"])), stock(adapted(CONFIGS["rslora"]))
    for each in (model, reference):
        run(each)
        torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.5).step()
    torch.testing.assert_close(run_logits(model), run_logits(reference), rtol=1e-4, atol=1e-4)


def test_a_mask_is_refused_since_it_would_be_ignored():
    model = with_kernels(adapted(CONFIGS["rslora"]))
    with pytest.raises(ValueError, match="position_ids and no attention_mask"):
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS))


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BOTH = {"target_modules": ATTENTION, "target_parameters": list(EXPERTS)}
NOT_PLAIN = {
    "dropout": {"lora_dropout": 0.1},
    "dora": {"use_dora": True},
    "bias of an adapter": {"lora_bias": True},
    "trained biases": {"bias": "lora_only"},
    "trained biases, all": {"bias": "all"},
    "trained norm": {"modules_to_save": ["post_attention_layernorm"]},
    "trained projection": {"target_modules": ["k_proj"], "modules_to_save": ["q_proj"]},
    "adapter on a weight": {"target_modules": ["k_proj"], "target_parameters": ["self_attn.q_proj.weight"]},
}


@pytest.mark.parametrize("settings", NOT_PLAIN.values(), ids=NOT_PLAIN.keys())
def test_a_layer_that_is_not_plain_is_not_joined_and_learns_all_that_peft_lets_it(settings: dict[str, Any]):
    settings = {"target_modules": ATTENTION, **settings}
    expected = run(stock(adapted(settings).eval()))
    model = with_kernels(adapted(settings).eval())
    assert not any(hasattr(layer, "joint") for layer in find_decoder(model).layers)
    require_same(run(model), expected)


@pytest.mark.parametrize("safe", [False, True], ids=["in place", "safe"])
def test_a_merged_adapter_is_in_the_weights_that_are_used(safe: bool):
    """PEFT's safe merge gives each weight new memory: the joined matrix would be the one without the adapter."""
    expected, base = run_logits(stock(adapted(BOTH))), run_logits(stock(adapted(BOTH)).unload())
    model = with_kernels(adapted(BOTH))
    run_logits(model)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(run_logits(model), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(run_logits(model), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run_logits(model.merge_and_unload(safe_merge=safe)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run_logits(with_kernels(adapted(BOTH)).unload()), base, rtol=1e-5, atol=1e-5)


def test_joined_weights_are_the_base_s_own():
    joined, plain = with_kernels(adapted(BOTH)).state_dict(), adapted(BOTH).state_dict()
    assert joined.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(joined[name], tensor, rtol=0, atol=0)


def test_an_adapter_can_be_switched_off_within_an_era():
    """What is kept for the passes of a step is that of the adapter which was on."""
    model, era = adapted(BOTH), Era()
    on, off = run_logits(stock(adapted(BOTH))), run_logits(stock(adapted(BOTH)).unload())
    with_kernels(model, join=False, era=era)
    join_layers(model, era=era)
    for order in ((True, False, True), (False, True, False)):
        era.begin()
        for is_on in order:
            with nullcontext() if is_on else model.disable_adapter():
                torch.testing.assert_close(run_logits(model), on if is_on else off, rtol=1e-5, atol=1e-5)
        era.end()


def test_another_adapter_may_come_later_where_its_rank_is_the_same():
    model = with_kernels(adapted({"target_modules": ATTENTION}))
    reference = stock(adapted({"target_modules": ATTENTION}))
    for each in (model, reference):
        torch.manual_seed(2)
        each.add_adapter("later", LoraConfig(r=3, target_modules=["k_proj"], init_lora_weights=False))
        each.set_adapter("later")
    torch.testing.assert_close(run_logits(model), run_logits(reference), rtol=1e-5, atol=1e-5)
    model.add_adapter("wider", LoraConfig(r=4, target_modules=["k_proj"]))
    model.set_adapter("wider")
    with pytest.raises(ShapeError, match="rank 4 on k_proj, whose layer was joined with 3"):
        run_logits(model)


def make_again(model: Any) -> None:  # Any: a PeftModel, whose base is typed as a Tensor
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.train()


CHECKPOINTED = {
    **CONFIGS,
    "last o": {"target_modules": ["o_proj"], "layers_to_transform": [1]},
    "one projection": {"target_modules": ["k_proj"]},
    "lowest layer": {"target_modules": ["v_proj"], "layers_to_transform": [0]},
}


@pytest.mark.parametrize("settings", CHECKPOINTED.values(), ids=CHECKPOINTED.keys())
def test_layers_that_are_made_again_in_the_backward_pass_learn_the_same(settings: dict[str, Any]):
    expected = run(stock(adapted(settings)))
    model, era = adapted(settings), Era()
    with_kernels(model, join=False, era=era)
    join_layers(model, era=era)
    make_again(model)
    era.begin()
    require_same(run(model), expected)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "made again"])
def test_a_second_backward_pass_is_refused(checkpointed: bool):
    """The first one writes over what was kept: its gradients would be wrong."""
    model = with_kernels(adapted(BOTH))
    if checkpointed:
        make_again(model)
    loss = model(input_ids=IDS, position_ids=POSITIONS).logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass"):
        loss.backward()
