"""Every attention that gpt-oss may be trained with says what eager says, for packed documents as for one alone."""

from typing import Any

import pytest
import torch
from transformers import GptOssForCausalLM

from tasks.gptoss.documents import separate_documents
from tasks.gptoss.forward import flash_attention
from tests.gpu.small import small_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTHS = (300, 129, 211)


def make_model(kind: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = small_config(
        num_hidden_layers=4,
        num_local_experts=4,
        num_experts_per_tok=4,  # every expert: no choice that rounding could tip over
        vocab_size=512,
        initializer_range=0.05,
    )
    model = GptOssForCausalLM(config).to("cuda", dtype)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    model.set_attn_implementation("eager" if kind == "flash" else kind)
    flash_attention(model) if kind == "flash" else separate_documents(model)
    return model


def run(model: Any, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of all documents, and the gradient of the embeddings' inputs."""
    torch.manual_seed(1)
    documents = [torch.randint(512, (length,), device="cuda") for length in LENGTHS]
    embeds = [model.get_input_embeddings()(ids).detach().requires_grad_() for ids in documents]
    places = [torch.arange(length, device="cuda") for length in LENGTHS]
    if packed:
        logits = model(inputs_embeds=torch.cat(embeds)[None], position_ids=torch.cat(places)[None]).logits[0]
    else:
        each = zip(embeds, places, strict=True)
        logits = torch.cat([model(inputs_embeds=x[None], position_ids=at[None]).logits[0] for x, at in each])
    logits.float().log_softmax(-1)[:, 7].sum().backward()
    return logits.detach().float(), torch.cat([x.grad for x in embeds]).float()


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize(("kind", "bound"), [("eager", 1e-4), ("flex_attention", 1e-3)])
def test_packed_is_alone_and_eager(kind: str, bound: float):
    truth = run(make_model("eager", torch.float32), packed=False)
    model = make_model(kind, torch.float32)
    for packed in (True, False):
        for name, ours, exact in zip(("logits", "gradient"), run(model, packed), truth, strict=True):
            assert gap(ours, exact) < bound, (name, packed)


@pytest.mark.parametrize("kind", ["flex_attention", "flash"])
def test_in_bfloat16_it_is_as_near_to_the_truth_as_eager(kind: str):
    truth = run(make_model("eager", torch.float32), packed=False)
    eager = run(make_model("eager", torch.bfloat16), packed=False)
    model = make_model(kind, torch.bfloat16)
    for packed in (True, False):
        for name, ours, plain, exact in zip(("logits", "gradient"), run(model, packed), eager, truth, strict=True):
            assert gap(ours, exact) < 1.25 * gap(plain, exact), (name, packed)
            assert gap(plain, exact) < 0.3, name  # else the comparison says nothing
