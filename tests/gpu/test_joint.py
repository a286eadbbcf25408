"""Whole gpt-oss layers under our kernels on a GPU, against stock float32 arithmetic; CPU twin: test_forward.py."""

import copy

import pytest
import torch

from tasks.gptoss.documents import separate_documents
from tasks.gptoss.embedding import rest_embedding
from tasks.gptoss.forward import factor_experts, flash_attention, fuse_norms, join_layers
from tasks.train.loss import fuse_head
from tests.gpu.small import small_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TARGETS = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


def make(rank: int):
    """A small gpt-oss with an adapter that says something, in float32 whose values bfloat16 can hold."""
    from peft import LoraConfig, get_peft_model
    from transformers import GptOssForCausalLM

    torch.manual_seed(0)
    config = small_config()
    config._attn_implementation = "eager"
    model = get_peft_model(GptOssForCausalLM(config), LoraConfig(r=rank, lora_alpha=2 * rank, **TARGETS)).cuda()
    for name, weight in model.named_parameters():
        weight.data = torch.randn_like(weight) * (0.05 if weight.ndim > 1 else 0.1) + (1 if "norm" in name else 0)
        weight.data = weight.data.bfloat16().float()
    return model


def grads_of(model, ids: torch.Tensor, positions: torch.Tensor):
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        loss = model(input_ids=ids, position_ids=positions, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def speed(model, *, join: bool, recompute: int):
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            weight.data = weight.data.bfloat16()
    factor_experts(model, num_recomputed=recompute)
    fuse_norms(model)
    flash_attention(model)
    fuse_head(model.get_base_model())
    if join:
        join_layers(model)
        rest_embedding(model)
        assert all(hasattr(layer, "joint") for layer in model.get_base_model().model.layers)
        assert model.get_input_embeddings().weight.isnan().all()
    return model


@pytest.mark.parametrize("rank", [8, 3])
@pytest.mark.parametrize("lengths", [(700, 1, 323), (2048, 2048)])
def test_joint_layers_are_as_near_to_float32_as_layers_apart(lengths: tuple[int, ...], rank: int):
    positions = torch.cat([torch.arange(n, device="cuda") for n in lengths])[None]
    ids = torch.randint(1024, positions.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    model = make(rank)
    apart, joint = (speed(copy.deepcopy(model), join=join, recompute=int(join)) for join in (False, True))
    separate_documents(model)
    loss, exact = grads_of(model, ids, positions)
    found = {}
    for name, each in (("apart", apart), ("joint", joint)):
        for _ in range(2):  # the second pass adds to the gradients of the first, as micro-batches do
            near, grads = grads_of(each, ids, positions)
        assert near == pytest.approx(loss, rel=5e-3)
        assert grads.keys() == exact.keys()
        found[name] = {key: ((grads[key] / 2 - exact[key]).norm() / exact[key].norm()).item() for key in exact}
    for key, gap in found["joint"].items():
        assert gap < 1.5 * found["apart"][key] + 0.01, key


def test_an_embedding_on_the_host_is_the_embedding():
    model = make(8)
    ids = torch.randint(1024, (2, 77), device="cuda")
    expected = model.get_input_embeddings()(ids)
    rest_embedding(model)
    torch.testing.assert_close(model.get_input_embeddings()(ids), expected, rtol=0, atol=0)
    assert model.get_input_embeddings()(torch.tensor([[5000, -1]], device="cuda")).isnan().all()
