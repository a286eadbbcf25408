"""A LoRA pair to the dense change it stands for, in PEFT's own storage layout.

    Linear    A (R, I),   B (O, R)    -> delta (O, I) = scale * B @ A
    experts   A (E*R, I), B (O, R*E)  -> delta (E, I, O), per expert: A rows are expert-major, B columns rank-major

Ring: pure.  Shapes: E experts, I in-features, O out-features, R rank.
Source: Hu et al., arXiv:2106.09685, 4.1; layout: PEFT 0.21 ParamWrapper.get_delta_weight.
"""

from collections.abc import Iterator

import torch

from tasks.errors import ShapeError


def linear_delta(a_RI: torch.Tensor, b_OR: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Return W' - W of one Linear, float32 (O, I).

    >>> linear_delta(torch.ones(2, 3), torch.ones(4, 2), scale=0.5).unique().item()
    1.0
    """
    if a_RI.shape[0] != b_OR.shape[1]:
        raise ShapeError(
            f"LoRA pair does not fit: A is (R, I) = {tuple(a_RI.shape)}, B is (O, R) = {tuple(b_OR.shape)}"
        )
    return (b_OR.float() @ a_RI.float()) * scale


def expert_deltas(a_RI: torch.Tensor, b_OR: torch.Tensor, *, num_experts: int, scale: float) -> Iterator[torch.Tensor]:
    """Yield W'[e] - W[e], float32 (I, O), expert after expert.

    Args:
        a_RI: (E*R, I), row e*R + k is rank k of expert e.
        b_OR: (O, R*E), column k*E + e is rank k of expert e.
        num_experts: E.
        scale: alpha / R, or alpha / sqrt(R).

    >>> [d.shape for d in expert_deltas(torch.ones(4, 3), torch.ones(5, 4), num_experts=2, scale=1.0)]
    [torch.Size([3, 5]), torch.Size([3, 5])]
    """
    if a_RI.shape[0] != b_OR.shape[1] or a_RI.shape[0] % num_experts:
        raise ShapeError(
            f"LoRA pair does not fit {num_experts} experts: A is (E*R, I) = {tuple(a_RI.shape)}, "
            f"B is (O, R*E) = {tuple(b_OR.shape)}"
        )
    rank = a_RI.shape[0] // num_experts
    a_ERI = a_RI.float().reshape(num_experts, rank, -1)
    b_ORE = b_OR.float().reshape(-1, rank, num_experts)
    for expert in range(num_experts):
        yield (a_ERI[expert].T @ b_ORE[:, :, expert].T) * scale
