"""A LoRA pair to the dense change it stands for, in PEFT's own storage layout.

    Linear    A (R, I),   B (O, R)    -> delta (O, I) = scale * B @ A
    experts   A (E*R, I), B (O, R*E)  -> delta (E, I, O), per expert: A rows are expert-major, B columns rank-major

A delta is never held whole: `factors` gives two thin matrices per expert whose product it is, so any block of
rows and columns is the product of a few rows and columns.

Ring: pure.  Shapes: E experts, I in-features, O out-features, R rank; M, N rows and columns as they are stored.
Source: Hu et al., arXiv:2106.09685, 4.1; layout: PEFT 0.21 ParamWrapper.get_delta_weight.
"""

import torch

from tasks.errors import ShapeError

Factors = list[tuple[torch.Tensor, torch.Tensor]]


def factors(a_RI: torch.Tensor, b_OR: torch.Tensor, *, num_experts: int) -> Factors:
    """Return (left (M, R), right (R, N)) in float32 for each expert; left @ right * scale is its delta.

    Args:
        a_RI: (E*R, I), row e*R + k is rank k of expert e.
        b_OR: (O, R*E), column k*E + e is rank k of expert e.
        num_experts: E; 0 for a Linear, which gives one pair with M = O and N = I. With experts M = I and N = O.

    >>> [(left.shape, right.shape) for left, right in factors(torch.ones(4, 3), torch.ones(5, 4), num_experts=2)]
    [(torch.Size([3, 2]), torch.Size([2, 5])), (torch.Size([3, 2]), torch.Size([2, 5]))]
    """
    if a_RI.shape[0] != b_OR.shape[1] or a_RI.shape[0] % max(1, num_experts):
        raise ShapeError(
            f"LoRA pair does not fit {f'{num_experts} experts' if num_experts else 'a Linear'}: A is (E*R, I) = "
            f"{tuple(a_RI.shape)}, B is (O, R*E) = {tuple(b_OR.shape)}"
        )
    if not num_experts:
        return [(b_OR.float(), a_RI.float())]
    rank = a_RI.shape[0] // num_experts
    a_ERI = a_RI.float().reshape(num_experts, rank, -1)
    b_ORE = b_OR.float().reshape(-1, rank, num_experts)
    return [(a_ERI[expert].T, b_ORE[:, :, expert].T) for expert in range(num_experts)]


def delta_norm(pairs: Factors, *, scale: float) -> float:
    """Return the Frobenius norm of all deltas together, without forming one.

    |LR|^2 = sum of (L'L) * (RR'): two (R, R) matrices, in float64.

    >>> round(delta_norm([(torch.full((2, 1), 3.0), torch.full((1, 2), 2.0))], scale=0.5), 9)
    6.0
    """
    total = 0.0
    for left_MR, right_RN in pairs:
        left, right = left_MR.double(), right_RN.double()
        total += float(((left.T @ left) * (right @ right.T)).sum())
    return scale * max(total, 0.0) ** 0.5
