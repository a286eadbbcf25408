"""Gates that rest on the host between the two halves of a pass; on a GPU: tests/gpu/test_training.py."""

import gc

import pytest
import torch
from peft import PeftModel

from tasks.gptoss import shelf
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
    there = find_decoder(model).layers[0].mlp.experts.place.shelf
    with torch.no_grad():
        loss_of(model, IDS)
    assert there.below(1) is None
    loss_of(model, IDS)
    assert there.below(1) is not None


def test_pages_are_made_once_and_used_again(monkeypatch: pytest.MonkeyPatch):
    made: list[int] = []

    def count(num_bytes: int, **kwargs: bool) -> torch.Tensor:
        made.append(num_bytes)
        return new_page(num_bytes, **kwargs)

    monkeypatch.setattr(shelf, "new_page", count)
    model = with_kernels(adapted(SETTINGS), num_shelved=9)
    num_shelved = sum(layer.mlp.experts.place.is_shelved for layer in find_decoder(model).layers)
    for _ in range(3):
        loss_of(model, IDS).backward()
    assert len(made) == num_shelved > 0
    loss_of(model, IDS)  # nobody comes for these: they go with their pass
    gc.collect()
    loss_of(model, IDS).backward()
    assert len(made) == 2 * num_shelved


def test_a_shorter_batch_lies_in_the_pages_of_a_longer_one_which_are_made_anew_for_a_longer_still():
    there, pages = shelf.Shelf(), set[int]()
    for count, is_same in ((6, None), (3, True), (6, True), (7, False), (6, True)):
        tensors = [torch.randn(count, 4) for _ in range(2)]
        tickets = [there.put(layer, tensor) for layer, tensor in enumerate(tensors)]
        before = {ticket._page.data_ptr() for ticket in tickets}
        for ticket, tensor in zip(tickets[::-1], tensors[::-1], strict=True):
            assert torch.equal(ticket.take(), tensor)
        with pytest.raises(AssertionError):
            tickets[0].take()
        assert is_same is None or (before == pages) == is_same
        pages = before


def test_a_system_that_refuses_to_pin_memory_gives_other_memory():
    """Without a GPU torch refuses as CUDA does where too much is pinned: by a RuntimeError, which ended the run."""
    page = new_page(15, is_pinned=True)
    assert page.shape == (15,) and page.dtype == torch.uint8
    assert page.is_pinned() == torch.cuda.is_available()
