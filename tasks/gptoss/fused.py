"""Chains of element-wise torch operations as one kernel on a GPU, and as they stand on a CPU.

Ring: edge (live tensors).
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` where its first tensor is on a GPU; a CPU would need a C++ compiler for little gain.

    Sizes are taken as dynamic once a second one is seen, so a short last batch costs one compilation and no more.
    """
    compiled: Callable[P, R] = torch.compile(function)

    @wraps(function)
    def choose(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        on_gpu = isinstance(first, torch.Tensor) and first.is_cuda
        return (compiled if on_gpu else function)(*args, **kwargs)

    return choose
