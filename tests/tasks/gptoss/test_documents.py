"""Packed documents must not see each other: packed equals alone, in logits and gradients."""

import torch

from tasks.gptoss.documents import separate_documents
from tests.tiny import SHAPE, make_model

FIRST, SECOND = list(range(10, 31)), list(range(100, 117))  # both longer than the sliding window of 8


def packed_inputs() -> dict[str, torch.Tensor]:
    positions = [*range(len(FIRST)), *range(len(SECOND))]
    return {"input_ids": torch.tensor([FIRST + SECOND]), "position_ids": torch.tensor([positions])}


def test_stock_transformers_lets_them_see_each_other():
    """The reason for the hook; when this fails, transformers has mended it and the hook can go."""
    model = make_model()
    packed = model(**packed_inputs()).logits[0, len(FIRST) :]
    alone = model(input_ids=torch.tensor([SECOND])).logits[0]
    assert (packed - alone).abs().max() > 1e-4


def test_packed_equals_alone_in_logits():
    model = make_model()
    separate_documents(model)
    packed = model(**packed_inputs()).logits[0]
    for document, part in ((FIRST, packed[: len(FIRST)]), (SECOND, packed[len(FIRST) :])):
        alone = model(input_ids=torch.tensor([document])).logits[0]
        torch.testing.assert_close(part, alone, rtol=0, atol=1e-6)


def test_packed_equals_alone_in_gradients():
    model = make_model()
    separate_documents(model)

    def gradients(parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.stack([part.log_softmax(-1)[:, 7].sum() for part in parts]).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    together = gradients([model(**packed_inputs()).logits[0]])
    alone = gradients([model(input_ids=torch.tensor([document])).logits[0] for document in (FIRST, SECOND)])
    assert together.keys() == alone.keys()
    assert any("sinks" in name for name in together)
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_window_holds_exactly_n_tokens_with_the_current_one():
    """Changing a token N back changes nothing in a sliding layer; N - 1 back does."""
    model = make_model()
    separate_documents(model)
    window = SHAPE.sliding_window
    sliding = model.model.layers[0]
    assert model.config.layer_types[0] == "sliding_attention"
    outputs: list[torch.Tensor] = []
    sliding.self_attn.register_forward_hook(lambda module, args, result: outputs.append(result[0]))

    def last_output(changed_back: int | None) -> torch.Tensor:
        ids = list(range(20, 44))
        if changed_back is not None:
            ids[-1 - changed_back] = 200
        outputs.clear()
        model(input_ids=torch.tensor([ids]), position_ids=torch.arange(len(ids))[None])
        return outputs[0][0, -1]

    untouched = last_output(None)
    torch.testing.assert_close(last_output(window), untouched, rtol=0, atol=0)
    assert (last_output(window - 1) - untouched).abs().max() > 1e-6
