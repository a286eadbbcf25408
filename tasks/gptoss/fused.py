"""Chains of element-wise torch operations as one kernel on a GPU, and as they stand on a CPU.

Ring: edge (live tensors).
"""

import inspect
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
_MOST_GRAPHS = 64  # of one function; torch's own limit is 8, after which it goes on unfused without an error


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` where its first tensor is on a GPU; a CPU would need a C++ compiler for little gain.

    Sizes are taken as dynamic once a second one is seen, so a short last batch costs one compilation and no more.
    """
    compiled = compile_chain(function)

    @wraps(function)
    def choose(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        on_gpu = isinstance(first, torch.Tensor) and first.is_cuda
        return (compiled if on_gpu else function)(*args, **kwargs)

    return choose


def compile_chain(function: Callable[P, R], backend: Any = "inductor") -> Callable[P, R]:  # Any: torch's name or own
    """Compile `function`, which must not change its arguments, to few graphs.

    torch makes one for each number of dimensions, dtype and kind of size, with autocast and without, and with gradients
    and without. Where none are recorded it would make more: for a tensor that wants one, and for a view of another
    tensor. Detached they are all the same to it.
    """
    compiler: Any = torch.compile  # Any: its overloads don't know the limit
    limit: dict[str, int] = {}
    if "recompile_limit" in inspect.signature(compiler).parameters:
        limit["recompile_limit"] = _MOST_GRAPHS
    else:  # torch 2.11: one for the process
        config: Any = import_module("torch._dynamo").config  # Any: made at run time
        config.recompile_limit = max(config.recompile_limit, _MOST_GRAPHS)
    compiled: Any = compiler(function, backend=backend, **limit)

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_grad_enabled():
            return compiled(*args, **kwargs)
        return compiled(*(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args), **kwargs)

    return call


def power_of_two(count: int) -> int:
    """Return the next power of two: ranges in Triton are so long.

    >>> [power_of_two(count) for count in (1, 8, 2880)]
    [1, 8, 4096]
    """
    return 1 << (count - 1).bit_length()
