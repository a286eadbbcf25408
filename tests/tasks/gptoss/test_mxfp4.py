"""Our MXFP4 values are transformers' values, to the bit, for every nibble and every scale."""

import math

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


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 4), st.integers(0, 254), st.integers(0, 40))
def test_what_the_format_holds_comes_back_exactly(seed: int, rows: int, groups: int, low: int, spread: int):
    blocks, scales = _random(seed, 1, rows, groups, low, min(254, low + spread))
    values = subject.dequantize_rows(blocks, scales)
    values = torch.where(torch.isfinite(values), values, 0.0)
    assert torch.equal(subject.dequantize_rows(*subject.quantize(values)), values)


def _nearest(value: float, exponent: int) -> float:
    """The value of the grid next to `value`, ties to the even code, by trying all."""
    grid = [(abs(value) / 2.0**exponent - size, code, size) for code, size in enumerate(subject.FP4_VALUES[:8])]
    return min(grid, key=lambda item: (abs(item[0]), item[1] % 2))[2] * 2.0**exponent


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=32), st.integers(-20, 20))
def test_each_block_is_rounded_at_the_better_of_two_scales(numbers: list[float], shift: int):
    values = torch.tensor(numbers, dtype=torch.float32) * 2.0**shift
    stored = subject.dequantize_rows(*subject.quantize(values)).double()
    largest = values.abs().max().item()
    if largest == 0:
        assert not stored.any()
        return
    first = math.frexp(largest)[1] - 3  # OCP Microscaling v1.0, 6.3
    tried = [[_nearest(value, exponent) for value in values.tolist()] for exponent in (first, first + 1)]
    errors = [sum((size - abs(v)) ** 2 for size, v in zip(sizes, values.tolist(), strict=True)) for sizes in tried]
    error = (stored - values.double()).square().sum().item()
    assert error == pytest.approx(min(errors), rel=1e-4)
    assert (torch.sign(stored) * torch.sign(values) >= 0).all()


def test_the_second_scale_is_worth_it():
    values = torch.randn(64, 320, generator=torch.Generator().manual_seed(0)) * 0.02
    sizes = values.abs().unflatten(-1, (-1, 32))
    ocp = torch.frexp(sizes.amax(-1, keepdim=True)).exponent - 3
    alone = torch.ldexp(subject._rounded(sizes, ocp)[1], 2 * ocp).sum().sqrt() / values.norm()
    ours = (subject.dequantize_rows(*subject.quantize(values)) - values).norm() / values.norm()
    assert ours < 0.99 * alone < 0.12
