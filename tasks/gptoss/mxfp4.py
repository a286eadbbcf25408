"""MXFP4 blocks to floats, on any device, without extra kernels.

    blocks (E, O, I/32, 16) uint8, scales (E, O, I/32) uint8  ->  parameter (E, I, O)

Byte j of a block holds value 2j in its low nibble and 2j + 1 in its high one; a value is
FP4[nibble] * 2 ** (scale - 127). The stored tensor is the transposed parameter.

Ring: pure.  Shapes: E experts, O out-features, I in-features.
Source: OCP Microscaling Formats v1.0, 5.3 and 6.3; openai/gpt-oss, torch/weights.py.
"""

import torch

from tasks.errors import ShapeError

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127


def dequantize(blocks_EOGB: torch.Tensor, scales_EOG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the parameter (E, I, O) in `dtype`; exact in bfloat16 and float32.

    Raises: ShapeError when blocks and scales do not belong together.
    Cost: 32 values per 17 bytes; the result is E*I*O elements.

    >>> blocks = torch.full((1, 1, 1, 16), 0x21, dtype=torch.uint8)  # low nibble 1 = 0.5, high nibble 2 = 1.0
    >>> dequantize(blocks, torch.tensor([[[128]]], dtype=torch.uint8), torch.float32)[0, :4, 0].tolist()
    [1.0, 2.0, 1.0, 2.0]
    """
    if blocks_EOGB.shape[:-1] != scales_EOG.shape or blocks_EOGB.shape[-1] != 16:
        raise ShapeError(
            f"MXFP4 blocks {tuple(blocks_EOGB.shape)} do not fit scales {tuple(scales_EOG.shape)}: expected "
            "(E, O, I/32, 16) and (E, O, I/32)"
        )
    table = torch.tensor(FP4_VALUES, dtype=torch.float32, device=blocks_EOGB.device)
    low, high = table[(blocks_EOGB & 0x0F).long()], table[(blocks_EOGB >> 4).long()]
    values = torch.stack([low, high], dim=-1).flatten(-2)
    exponent = (scales_EOG.to(torch.int32) - _BIAS).unsqueeze(-1)
    values_EOI = torch.ldexp(values, exponent).flatten(-2)
    return values_EOI.transpose(-1, -2).to(dtype)
