"""Flash attention with sinks, windows and packed documents is the plain one; GPU twin in tests/gpu/test_kernels.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.gptoss.attention import attend_with_sinks, find_documents

SCALE = 0.3


def alone(q, k, v, sinks, window):
    """One document by the book."""
    copies = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
    place = torch.arange(len(q))
    back = place[:, None] - place[None]
    seen = (back >= 0) & (back < (window or len(q)))
    logits = (torch.einsum("nad,mad->anm", q, k) * SCALE).masked_fill(~seen, float("-inf"))
    column = sinks[:, None, None].expand(-1, len(q), 1)
    return torch.einsum("anm,mad->nad", torch.cat([logits, column], -1).softmax(-1)[..., :-1], v)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    window=st.one_of(st.none(), st.integers(1, 9)),
)
def test_packed_is_alone_in_value_and_gradient(seed: int, lengths: list[int], window: int | None):
    torch.manual_seed(seed)
    total = sum(lengths)
    leaves = [torch.randn(total, heads, 8) for heads in (4, 2, 2)] + [torch.randn(4) * 2]
    dout = torch.randn(total, 4, 8)

    def run(packed: bool):
        q, k, v, sinks = mine = [leaf.clone().requires_grad_() for leaf in leaves]
        if packed:
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            out = attend_with_sinks(q, k, v, sinks, find_documents(positions), window=window, scale=SCALE)
        else:
            parts = zip(*(part.split(lengths) for part in (q, k, v)), strict=True)
            out = torch.cat([alone(*part, sinks, window) for part in parts])
        return out, torch.autograd.grad(out, mine, dout)

    (ours, grads), (expected, expected_grads) = run(packed=True), run(packed=False)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_row_that_goes_on_where_another_ends_is_two_documents():
    documents = find_documents(torch.tensor([[0, 1, 0, 0, 1, 2]]))
    assert documents.ends.tolist() == [0, 2, 3, 6] and documents.longest == 3


def test_a_batch_that_begins_inside_a_document_is_refused():
    with pytest.raises(ValueError, match="position 5, expected 0"):
        find_documents(torch.tensor([[5, 6, 0, 1]]))
