"""Our MXFP4 values are transformers' values, to the bit, for every nibble and every scale."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tasks.errors import ShapeError
from tasks.gptoss import mxfp4 as subject


def _random(seed: int, experts: int, out: int, groups: int, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, out, groups, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(low, high + 1, (experts, out, groups), generator=generator, dtype=torch.uint8)
    return blocks, scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3))
def test_same_as_transformers(dtype: torch.dtype, seed: int, experts: int, out: int, groups: int):
    blocks, scales = _random(seed, experts, out, groups, 1, 250)
    ours = subject.dequantize(blocks, scales, dtype)
    assert ours.dtype == dtype
    assert ours.shape == (experts, groups * 32, out)
    assert torch.equal(ours, convert_moe_packed_tensors(blocks, scales, dtype=dtype))


@pytest.mark.parametrize("scale", [0, 1, 2, 126, 127, 128, 252, 253, 254])
def test_every_nibble_at_extreme_scales(scale: int):
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    scales = torch.full((1, 1, 16), scale, dtype=torch.uint8)
    ours = subject.dequantize(blocks, scales, torch.float32).flatten().double()
    nibbles = [nibble for byte in range(256) for nibble in (byte & 15, byte >> 4)]
    exact = torch.tensor([subject.FP4_VALUES[nibble] for nibble in nibbles], dtype=torch.float64) * 2.0 ** (scale - 127)
    largest = torch.finfo(torch.float32).max
    expected = torch.where(exact.abs() > largest, exact.sign() * torch.inf, exact)
    assert torch.equal(ours, expected)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).flatten().double()
    assert torch.equal(ours, theirs)


def test_values_are_those_of_the_format():
    """OCP Microscaling v1.0, table 5: E2M1 has sign, two exponent bits of bias 1, one of mantissa."""
    for nibble, value in enumerate(subject.FP4_VALUES):
        sign, exponent, mantissa = nibble >> 3, (nibble >> 1) & 3, nibble & 1
        size = (1 + mantissa / 2) * 2 ** (exponent - 1) if exponent else mantissa / 2
        assert abs(value) == size
        assert str(value).startswith("-") is bool(sign)


@pytest.mark.parametrize(
    ("blocks", "scales"), [((2, 3, 1, 16), (2, 3, 2)), ((2, 3, 1, 8), (2, 3, 1)), ((3, 1, 16), (3,))]
)
def test_tensors_that_do_not_belong_together_are_named(blocks: tuple[int, ...], scales: tuple[int, ...]):
    with pytest.raises(
        ShapeError, match=r"MXFP4 blocks \(.*\) do not fit scales \(.*\): expected \(E, O, I/32, 16\) and"
    ):
        subject.dequantize(
            torch.zeros(blocks, dtype=torch.uint8), torch.zeros(scales, dtype=torch.uint8), torch.float32
        )
