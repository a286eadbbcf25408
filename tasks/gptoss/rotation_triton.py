"""Rotary positions as Triton kernels; what they compute is in rotation.py.

Ring: edge; imported on machines with a GPU only.
"""

# Triton's language has no types that pyright knows, and it is not installed without CUDA.
# pyright: basic, reportMissingImports=false

import triton
import triton.language as tl


@triton.jit
def rotate(qkv_ptr, cos_ptr, sin_ptr, stride, num_pairs, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Turn the first `num_pairs` pairs of row `program_id(0)` where they lie."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < num_pairs
    angle = pair % HALF
    cos = tl.load(cos_ptr + row * HALF + angle, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * HALF + angle, mask=inside, other=0.0).to(tl.float32)
    place = qkv_ptr + row * stride + pair // HALF * 2 * HALF + angle
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (first * cos - second * sin).to(qkv_ptr.dtype.element_ty), mask=inside)
    tl.store(place + HALF, (second * cos + first * sin).to(qkv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotate_back(
    q_ptr, k_ptr, v_ptr, out_ptr, cos_ptr, sin_ptr, q_row, q_head, k_row, k_head, v_row, v_head, stride, q_pairs,
    k_pairs, HALF: tl.constexpr, Q_BLOCKS: tl.constexpr, K_BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a block of row `program_id(0)`: of q and k turned back, of v as it is."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if block < Q_BLOCKS:
        _turn_back(q_ptr + row * q_row, q_head, out_ptr + row * stride, cos_ptr + row * HALF, sin_ptr + row * HALF,
                   block, q_pairs, True, HALF, BLOCK)  # fmt: skip
    elif block < Q_BLOCKS + K_BLOCKS:
        _turn_back(k_ptr + row * k_row, k_head, out_ptr + row * stride + 2 * q_pairs, cos_ptr + row * HALF,
                   sin_ptr + row * HALF, block - Q_BLOCKS, k_pairs, True, HALF, BLOCK)  # fmt: skip
    else:
        _turn_back(v_ptr + row * v_row, v_head, out_ptr + row * stride + 2 * (q_pairs + k_pairs), cos_ptr, sin_ptr,
                   block - Q_BLOCKS - K_BLOCKS, k_pairs, False, HALF, BLOCK)  # fmt: skip


@triton.jit
def _turn_back(
    from_ptr, head_stride, to_ptr, cos_ptr, sin_ptr, block, num_pairs, TURNS: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pair = block * BLOCK + tl.arange(0, BLOCK)
    inside = pair < num_pairs
    head, angle = pair // HALF, pair % HALF
    place = from_ptr + head.to(tl.int64) * head_stride + angle
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    if TURNS:
        cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
        first, second = first * cos + second * sin, second * cos - first * sin
    there = to_ptr + head * 2 * HALF + angle
    tl.store(there, first.to(to_ptr.dtype.element_ty), mask=inside)
    tl.store(there + HALF, second.to(to_ptr.dtype.element_ty), mask=inside)
