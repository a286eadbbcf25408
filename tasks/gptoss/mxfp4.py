"""MXFP4 blocks to floats and back, on any device, without extra kernels.

    blocks (E, O, I/32, 16) uint8, scales (E, O, I/32) uint8  <->  parameter (E, I, O)

Byte j of a block holds value 2j in its low nibble and 2j + 1 in its high one; a value is
FP4[nibble] * 2 ** (scale - 127). The stored tensor is the transposed parameter: a block of 32 runs along the
in-features of one out-feature. The out-features of gate_up_proj stay interleaved, g0, u0, g1, u1, ...

Ring: pure.  Shapes: E experts, O out-features, I in-features, G = I/32 blocks, N any number of rows.
Source: OCP Microscaling Formats v1.0, 5.3 and 6.3; openai/gpt-oss, torch/weights.py.
"""

import torch

from tasks.errors import ShapeError

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BLOCK_VALUES = 32
NAN_SCALE = 255
QUANTIZATION_CONFIG = {  # as in openai/gpt-oss-20b
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
_BIAS = 127
_LARGEST, _LARGEST_EXPONENT = 6.0, 2
_BITS = {torch.bfloat16: (torch.int16, 7), torch.float32: (torch.int32, 23)}  # integer as wide, bits of the mantissa


def dequantize(blocks_EOGB: torch.Tensor, scales_EOG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the parameter (E, I, O) in `dtype`; exact in bfloat16 and float32.

    Raises: ShapeError when blocks and scales do not belong together.
    Cost: 32 values per 17 bytes; the result is E*I*O elements.

    >>> blocks = torch.full((1, 1, 1, 16), 0x21, dtype=torch.uint8)  # low nibble 1 = 0.5, high nibble 2 = 1.0
    >>> dequantize(blocks, torch.tensor([[[128]]], dtype=torch.uint8), torch.float32)[0, :4, 0].tolist()
    [1.0, 2.0, 1.0, 2.0]
    """
    return dequantize_rows(blocks_EOGB, scales_EOG).transpose(-1, -2).to(dtype)


@torch.no_grad()
def unpack(blocks_EOGB: torch.Tensor, scales_EOG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the parameter (E, I, O), contiguous: what `dequantize` says, expert by expert and without float32.

    For a layer that is unpacked each time it passes.  Cost: beside the result 5 bytes a value of one expert.
    """
    if blocks_EOGB.shape[:-1] != scales_EOG.shape or dtype not in _BITS:
        raise ShapeError(f"MXFP4 {tuple(blocks_EOGB.shape)}, {tuple(scales_EOG.shape)} can't be unpacked to {dtype}")
    whole, shift = _BITS[dtype]
    device = blocks_EOGB.device
    nibbles = torch.arange(256, device=device)
    table = torch.tensor(FP4_VALUES, dtype=dtype, device=device)
    pairs = torch.stack([table[nibbles & 15], table[nibbles >> 4]], dim=-1)
    num_experts, outputs, groups, _ = blocks_EOGB.shape
    made = torch.empty(num_experts, groups * BLOCK_VALUES, outputs, dtype=dtype, device=device)
    for expert in range(num_experts):
        values = pairs[blocks_EOGB[expert].to(torch.int32)].flatten(-2)
        # The exponent's field of a float with a bias of 127 is the scale itself; 2 ** -127 is below the normal ones.
        powers = (scales_EOG[expert].to(whole) << shift).where(scales_EOG[expert] > 0, 1 << (shift - 1)).view(dtype)
        made[expert].copy_(values.mul_(powers.unsqueeze(-1)).flatten(-2).T)
    return made


def dequantize_rows(blocks_NGB: torch.Tensor, scales_NG: torch.Tensor) -> torch.Tensor:
    """Return the values (N, I) in the order in which they are stored, float32. N may be several axes."""
    if blocks_NGB.shape[:-1] != scales_NG.shape or blocks_NGB.shape[-1] != BLOCK_VALUES // 2:
        raise ShapeError(
            f"MXFP4 blocks {tuple(blocks_NGB.shape)} do not fit scales {tuple(scales_NG.shape)}: expected "
            "(E, O, I/32, 16) and (E, O, I/32)"
        )
    nibbles = torch.arange(256, device=blocks_NGB.device)
    table = torch.tensor(FP4_VALUES, dtype=torch.float32, device=blocks_NGB.device)
    pairs = torch.stack([table[nibbles & 15], table[nibbles >> 4]], dim=-1)  # one look-up a byte
    values = torch.nn.functional.embedding(blocks_NGB.to(torch.int32), pairs).flatten(-2)
    return torch.ldexp(values, scales_NG.to(torch.int32).sub_(_BIAS).unsqueeze(-1)).flatten(-2)


def quantize(values_NI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (blocks (N, I/32, 16), scales (N, I/32)) of finite float32 values; N may be several axes.

    The scale of a block is OCP's (the exponent of its largest value, less 2) or the next larger one, at which the
    largest value is not cut off, whichever has the smaller squared error. Values round to even. What MXFP4 can
    hold comes back exactly.

    >>> blocks, scales = quantize(torch.tensor([[0.5, 7.0] + [0.0] * 30]))
    >>> dequantize_rows(blocks, scales)[0, :2].tolist()  # 7 is cut to 6 or rounded to 8: one scale, 0.5 or nothing
    [0.5, 6.0]
    """
    values = values_NI.unflatten(-1, (-1, BLOCK_VALUES))
    sizes = values.abs()
    largest = sizes.amax(-1, keepdim=True)
    exponent = torch.frexp(largest).exponent - 1 - _LARGEST_EXPONENT
    exponent = torch.where(largest > 0, exponent, -_BIAS).clamp(-_BIAS, _BIAS)
    upper = (exponent + 1).clamp(max=_BIAS)
    (sizes, error), (coarse, coarse_error) = _rounded(sizes, exponent), _rounded(sizes, upper)
    better = 4 * coarse_error < error  # each in units of its own scale, squared
    exponent = torch.where(better, upper, exponent)
    codes = _codes(torch.where(better, coarse, sizes)) | (torch.signbit(values).to(torch.uint8) << 3)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponent.squeeze(-1) + _BIAS).to(torch.uint8)


def packed_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of blocks and scales of a parameter (E, I, O).

    >>> packed_shapes((4, 64, 10))
    ((4, 10, 2, 16), (4, 10, 2))
    """
    num_experts, inputs, outputs = shape
    scales = (num_experts, outputs, inputs // BLOCK_VALUES)
    return (*scales, BLOCK_VALUES // 2), scales


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """Return 2 ** exponent, float32."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def _rounded(sizes: torch.Tensor, exponent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sizes / 2 ** exponent on FP4's grid, squared error of each block in the same unit).

    The grid's step at s is half the power of two below s, and 0.5 below 1. Adding and taking away 1.5 * 2 ** 23
    steps rounds to whole steps, half to even: ten times faster than division and round().
    """
    scaled = sizes * _power(-exponent)
    power = (scaled.view(torch.int32) & 0x7F800000).clamp_(min=0x3F800000).view(torch.float32)
    power *= 1.5 * 2**22
    rounded = (scaled + power).sub_(power).clamp_(max=_LARGEST)
    return rounded, scaled.sub_(rounded).square_().sum(-1, keepdim=True)


def _codes(sizes: torch.Tensor) -> torch.Tensor:
    """Return the three low bits of 0, .5, 1, 1.5, 2, 3, 4, 6."""
    halves = (sizes * 2).to(torch.uint8)
    return halves.clamp(max=4) + (halves.clamp(4, 8) - 4) // 2 + (halves.clamp(min=8) - 8) // 4
