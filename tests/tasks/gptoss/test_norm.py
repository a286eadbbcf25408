"""gpt-oss's norm of a sum; on a GPU: tests/gpu/test_kernels.py."""

import torch

from tasks.gptoss.norm import add_norm, normed


def test_the_norm_of_a_sum_is_not_that_of_the_rounded_sum():
    """Rounded twice, gradients in bfloat16 were farther from those in float32."""
    torch.manual_seed(0)
    x, more, weight = torch.randn(64, 96).bfloat16(), torch.randn(64, 96).bfloat16(), torch.rand(96).bfloat16()
    total, found = add_norm(x, more, weight, 1e-5)
    exact = normed(x.double() + more.double(), weight.double(), 1e-5)
    assert torch.equal(total, x + more) and found.dtype == torch.bfloat16
    assert (found - exact).norm() < 0.9 * (normed(total, weight, 1e-5) - exact).norm()
