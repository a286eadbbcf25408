"""Rows of a table that lies in pinned memory of the host, read by the GPU itself.

Ring: edge; imported on machines with a GPU only.
"""

# Triton's language has no types that pyright knows, and it is not installed without CUDA.
# pyright: basic, reportMissingImports=false

import triton
import triton.language as tl


@triton.jit
def look_up(table_ptr, ids_ptr, rows_ptr, num_ids, width, BLOCK: tl.constexpr):
    """Write row `program_id`: the table's, or NaN for an id that it does not have."""
    row = tl.program_id(0).to(tl.int64)
    one = tl.load(ids_ptr + row)
    is_known = (one >= 0) & (one < num_ids)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(table_ptr + one * width + column, mask=inside & is_known, other=float("nan"))
    tl.store(rows_ptr + row * width + column, values, mask=inside)
