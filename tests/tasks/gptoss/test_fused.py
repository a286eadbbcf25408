"""A fused chain stays fused: few graphs, and more of them than torch's own limit where they are needed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tasks.gptoss.fused import compile_chain
from tasks.gptoss.norm import normed, normed_in_chain


def counting(graphs: list[int]) -> Callable[..., Any]:
    """A backend that runs what it is given as it stands, and says that it was asked."""

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return module.forward

    return backend


def test_where_nothing_is_differentiated_one_graph_serves_all_layers():
    """The lowest layer's input wants no gradient, a later one's does and is a view, and weights are parameters or not.

    Each was a graph of its own: nine of `normed` and ten of `norm_back` in one training, more than torch allows.
    """
    graphs: list[int] = []
    norm = compile_chain(normed_in_chain.__wrapped__, counting(graphs))  # pyright: ignore[reportFunctionMemberAccess]
    x_NH, weight_H = torch.randn(6, 8), torch.rand(8)
    wanted_NH = x_NH.clone().requires_grad_()
    view_NH = (wanted_NH * 1)[None].flatten(0, 1)
    with torch.no_grad():
        expected = normed(x_NH, weight_H, 1e-5)
        for each in (x_NH, wanted_NH, view_NH, nn.Parameter(x_NH)):
            for weight in (weight_H, nn.Parameter(weight_H)):
                found = norm(each, weight, 1e-5)
                assert not found.requires_grad
                torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(graphs) == 1


def test_gradients_go_through_it_where_they_are_recorded():
    norm = compile_chain(normed_in_chain.__wrapped__, counting([]))  # pyright: ignore[reportFunctionMemberAccess]
    grads = []
    for function in (norm, normed):
        x_NH = torch.arange(12.0).view(3, 4).requires_grad_()
        function(x_NH, torch.rand(4, generator=torch.Generator().manual_seed(0)), 1e-5).sum().backward()
        grads.append(x_NH.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_a_ninth_graph_is_made():
    """torch's limit is 8: what comes after it would run unfused, and nothing would say so but a warning."""
    graphs: list[int] = []

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    chain = compile_chain(double, counting(graphs))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for num_dims in (1, 2, 3):
            chain(torch.ones([2] * num_dims, dtype=dtype))
    assert len(graphs) == 12
