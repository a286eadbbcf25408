"""The gate of gpt-oss's experts as Triton kernels, one row per program; what they compute is in gate.py.

Ring: edge; imported on machines with a GPU only.
"""

# Triton's language has no types that pyright knows, and it is not installed without CUDA.
# pyright: basic, reportMissingImports=false

import triton
import triton.language as tl


@triton.jit
def gate_forward(
    h_ptr, g_ptr, g_stride, alpha, limit, width, rank, BLOCK: tl.constexpr, NUM_PLAIN: tl.constexpr
):  # fmt: skip
    """Write row `program_id` of [g | `rank` columns as they are | 1 | 0]."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, width, BLOCK):
        pair = 2 * start + tl.arange(0, 2 * BLOCK)
        h = tl.load(h_ptr + row * 2 * width + pair, mask=pair < 2 * width, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(h, (BLOCK, 2)))
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        g = (up + 1) * gate * tl.sigmoid(gate * alpha)
        column = start + tl.arange(0, BLOCK)
        tl.store(g_ptr + row * g_stride + column, g.to(g_ptr.dtype.element_ty), mask=column < width)
    plain = tl.arange(0, NUM_PLAIN)
    tail = tl.where(plain == 0, 1.0, 0.0).to(g_ptr.dtype.element_ty)
    tl.store(g_ptr + row * g_stride + width + rank + plain, tail)


@triton.jit
def gate_backward(
    h_ptr, dg_ptr, dg_stride, detour_ptr, w_ptr, g_ptr, dh_ptr, dot_ptr, alpha, limit, width,
    HAS_DETOUR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write g, dh and the dot product of row `program_id`; g may lie over the detour and dh over h."""
    row = tl.program_id(0).to(tl.int64)
    w = tl.load(w_ptr + row).to(tl.float32)
    dot = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        pair = 2 * start + tl.arange(0, 2 * BLOCK)
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        h = tl.load(h_ptr + row * 2 * width + pair, mask=pair < 2 * width, other=0.0).to(tl.float32)
        total = tl.load(dg_ptr + row * dg_stride + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_DETOUR:
            total += tl.load(detour_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        raw_gate, raw_up = tl.split(tl.reshape(h, (BLOCK, 2)))
        gate = tl.minimum(raw_gate, limit)
        up = tl.minimum(tl.maximum(raw_up, -limit), limit)
        sigmoid = tl.sigmoid(gate * alpha)
        glu = gate * sigmoid
        g = (up + 1) * glu
        dot += g * total
        weighted = total * w
        dgate = tl.where(raw_gate <= limit, weighted * (up + 1) * sigmoid * (1 + alpha * gate * (1 - sigmoid)), 0.0)
        dup = tl.where(tl.abs(raw_up) <= limit, weighted * glu, 0.0)
        tl.store(g_ptr + row * width + column, g.to(g_ptr.dtype.element_ty), mask=inside)
        dh = tl.reshape(tl.join(dgate, dup), (2 * BLOCK,))
        tl.store(dh_ptr + row * 2 * width + pair, dh.to(dh_ptr.dtype.element_ty), mask=pair < 2 * width)
    tl.store(dot_ptr + row, tl.sum(dot, axis=0))
