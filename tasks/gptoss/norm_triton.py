"""gpt-oss's RMS norm as Triton kernels, a row per program, which is read once; what they compute is in norm.py.

Ring: edge; imported on machines with a GPU only.
"""

# Triton's language has no types that pyright knows, and it is not installed without CUDA.
# pyright: basic, reportMissingImports=false

import triton
import triton.language as tl


@triton.jit
def norm_forward(
    x_ptr, more_ptr, weight_ptr, sum_ptr, out_ptr, out_stride, width, epsilon, num_tail, HAS_MORE: tl.constexpr,
    IS_ALIGNED: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write row `program_id` of [norm | 1 | 0], and with `HAS_MORE` the sum that the norm is of, rounded."""
    row = tl.program_id(0).to(tl.int64)
    there = row * out_stride
    if IS_ALIGNED:  # Triton looks for multiples of 16 itself, and else moves two bytes at a time
        there = tl.multiple_of(there, 8)
    column = tl.arange(0, BLOCK)
    inside = column < width
    wide = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_MORE:
        wide += tl.load(more_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(sum_ptr + row * width + column, wide.to(sum_ptr.dtype.element_ty), mask=inside)
    root = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + epsilon)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    out = (weight * (wide * root)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + there + column, out, mask=inside)
    if TAIL:
        tail = tl.arange(0, TAIL)
        ones = tl.where(tail == 0, 1.0, 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + there + width + tail, ones, mask=tail < num_tail)


@triton.jit
def norm_back(
    x_ptr, weight_ptr, slope_ptr, slope_stride, other_ptr, out_ptr, width, epsilon, IS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write row `program_id` of the norm's gradient, with the other."""
    row = tl.program_id(0).to(tl.int64)
    there = row * slope_stride
    if IS_ALIGNED:
        there = tl.multiple_of(there, 8)
    column = tl.arange(0, BLOCK)
    inside = column < width
    wide = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    inner = tl.load(slope_ptr + there + column, mask=inside, other=0.0).to(tl.float32) * weight
    other = tl.load(other_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + epsilon)
    share = tl.sum(wide * inner, axis=0) / width
    slope = root * inner - wide * (root * root * root * share)
    tl.store(out_ptr + row * width + column, (slope + other).to(out_ptr.dtype.element_ty), mask=inside)
