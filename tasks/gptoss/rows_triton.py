"""Rows into expert order as Triton kernels; what they compute is in rows.py.

Ring: edge; imported on machines with a GPU only.
"""

# Triton's language has no types that pyright knows, and it is not installed without CUDA.
# pyright: basic, reportMissingImports=false

import triton
import triton.language as tl


@triton.jit
def count_experts(index_ptr, counts_ptr, num_rows, num_experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Write how often each expert is chosen in block `program_id` of the choices."""
    block = tl.program_id(0)
    row = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, EXPERTS)
    chosen = tl.load(index_ptr + row, mask=row < num_rows, other=-1).to(tl.int32)
    counts = tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + block * num_experts + expert, counts, mask=expert < num_experts)


@triton.jit
def place_rows(
    index_ptr, counts_ptr, order_ptr, place_ptr, ends_ptr, num_rows, num_experts, num_blocks, EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write where each choice of block `program_id` goes, in order, and from which it came; the first: the ends."""
    block = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), dtype=tl.int32)
    before = tl.zeros((EXPERTS,), dtype=tl.int32)
    for start in range(0, num_blocks, CHUNK):
        other = start + tl.arange(0, CHUNK)
        known = (other[:, None] < num_blocks) & (expert[None, :] < num_experts)
        counts = tl.load(counts_ptr + other[:, None] * num_experts + expert[None, :], mask=known, other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where(other[:, None] < block, counts, 0), axis=0)
    ends = tl.cumsum(total, axis=0)
    if block == 0:
        tl.store(ends_ptr + expert, ends, mask=expert < num_experts)
    row = block * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    chosen = tl.load(index_ptr + row, mask=inside, other=-1).to(tl.int32)
    is_chosen = (chosen[:, None] == expert[None, :]).to(tl.int32)
    first = ends - total + before
    place = tl.sum(is_chosen * (first[None, :] + tl.cumsum(is_chosen, axis=0) - 1), axis=1).to(tl.int64)
    tl.store(place_ptr + row, place, mask=inside)
    tl.store(order_ptr + place, row.to(tl.int64), mask=inside)


@triton.jit
def spread(
    x_ptr, order_ptr, index_ptr, u_ptr, u_stride, out_ptr, out_stride, kept_ptr, width, num_chosen,
    RANK: tl.constexpr, WIDE: tl.constexpr, NUM_TAIL: tl.constexpr, TAIL: tl.constexpr, IS_NEW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write row `program_id` of [x | u | 1 | 0]: `WIDE` columns of u, of its token's expert where `IS_NEW`."""
    row = tl.program_id(0).to(tl.int64)
    choice = tl.load(order_ptr + row)
    token = choice // num_chosen
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + token * width + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * out_stride + column, x, mask=inside)
    if TAIL:
        tail = tl.arange(0, TAIL)
        value = tl.where(tail == WIDE, 1.0, 0.0).to(out_ptr.dtype.element_ty)
        if WIDE:
            if IS_NEW:
                from_ptr = u_ptr + token * u_stride + tl.load(index_ptr + choice) * RANK
            else:
                from_ptr = u_ptr + row * u_stride
            u = tl.load(from_ptr + tail, mask=tail < RANK, other=0.0)
            value = tl.where(tail < RANK, u, value)
            if IS_NEW:
                tl.store(kept_ptr + row * WIDE + tail, value, mask=tail < WIDE)
        tl.store(out_ptr + row * out_stride + width + tail, value, mask=tail < NUM_TAIL)
