"""Gates that rest on the host between the two halves of a pass; on a GPU: tests/gpu/test_training.py."""

import torch
from peft import PeftModel

from tasks.gptoss.forward import find_decoder
from tasks.gptoss.shelf import new_page
from tests.tasks.gptoss.test_forward import CONFIGS, IDS, POSITIONS, adapted, with_kernels

SETTINGS = CONFIGS["experts and attention"]


def loss_of(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, position_ids=POSITIONS).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])


def test_two_passes_may_wait_for_their_backward_halves():
    """The second must not take the place of the first, in whichever order they come back."""
    found = []
    for options in ({}, {"num_shelved": 9}):
        model = with_kernels(adapted(SETTINGS), **options)
        first, second = loss_of(model, IDS), loss_of(model, IDS.flip(1))
        first.backward()
        second.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=0, atol=0, msg=name)


def test_what_no_backward_pass_wants_is_not_put():
    model = with_kernels(adapted(SETTINGS), num_shelved=9)
    shelf = find_decoder(model).layers[0].mlp.experts.place.shelf
    with torch.no_grad():
        loss_of(model, IDS)
    assert shelf.below(1) is None
    loss_of(model, IDS)
    assert shelf.below(1) is not None


def test_a_system_that_refuses_to_pin_memory_gives_other_memory():
    """Without a GPU torch refuses as CUDA does where too much is pinned: by a RuntimeError, which ended the run."""
    page = new_page(torch.Size([3, 5]), torch.bfloat16, is_pinned=True)
    assert page.shape == (3, 5) and page.dtype == torch.bfloat16
    assert page.is_pinned() == torch.cuda.is_available()
