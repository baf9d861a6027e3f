"""Rotary position embedding of queries and keys, and its inverse, which is its gradient: bound by memory bandwidth.

y[i] = x[i] cos[i] - x[i + D/2] sin[i], y[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i]; values are copied. A tile is the
first and the second halves of several heads, which are adjacent in memory, of one token or of several. T tokens, A
heads, D head dimension.
"""

import triton
import triton.language as tl

from bertfast.kernels.attention import dense_tokens
from bertfast.kernels.device import ceil_div
from bertfast.kernels.jit import kernel
from bertfast.kernels.operation import operation
from bertfast.kernels.rows import in_rows

_TILE = 2048  # elements of the first halves of a tile: with 128 lanes, two loads of 16 bytes of bf16 per lane


@kernel
def rotary_kernel(
    x_ptr,  # [T, 3, A, D], tokens x_stride apart
    table_ptr,  # fp32 [T, D], rows table_stride apart: the cosines of D/2 angles, then their sines
    y_ptr,  # [T, 3, A, D]
    rows,  # 3 · A · T
    x_stride,
    table_stride,
    INVERSE: tl.constexpr,  # rotate by the negative angles
    HEADS: tl.constexpr,  # 3 · A
    D: tl.constexpr,
    HALF: tl.constexpr,  # D / 2, rounded up to a power of two
    ROWS: tl.constexpr,  # heads of a tile
):
    """Rotate, or copy, ROWS heads."""
    # Row r is head r % HEADS of token r // HEADS; only the tile's first row needs a division of 64 bits.
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    from_first_token = (first % HEADS).to(tl.int32) + row
    token, head = first // HEADS + from_first_token // HEADS, from_first_token % HEADS
    column = tl.arange(0, HALF)[None, :]
    inside = first + row < rows
    mask = inside
    if D // 2 != HALF:
        mask = inside & (column < D // 2)
    u_ptr = x_ptr + token * x_stride + head * D + column
    u = tl.load(u_ptr, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(u_ptr + D // 2, mask=mask, other=0.0).to(tl.float32)
    cos_ptr = table_ptr + token * table_stride + column
    is_rotated = head < HEADS // 3 * 2
    cos = tl.load(cos_ptr, mask=mask & is_rotated, other=1.0)
    sin = tl.load(cos_ptr + D // 2, mask=mask & is_rotated, other=0.0)
    if INVERSE:
        sin = -sin
    # Values are selected, not multiplied by 1 and 0: infinity times 0 is NaN.
    y_first = tl.where(is_rotated, u * cos - v * sin, u)
    y_second = tl.where(is_rotated, v * cos + u * sin, v)
    y_first_ptr = y_ptr + (first + row) * D + column
    tl.store(y_first_ptr, y_first.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_first_ptr + D // 2, y_second.to(y_ptr.dtype.element_ty), mask=mask)


@operation
def rotary_forward(qkv, table, *, out):
    """Write y [T, 3, A, D]."""
    _rotate(qkv, table, out, inverse=False)


@operation
def rotary_backward(d_y, table, *, out):
    """Write d_qkv [T, 3, A, D]."""
    _rotate(d_y, table, out, inverse=True)


def _rotate(x, table, y, *, inverse):
    x, table = dense_tokens(x), in_rows(table)
    tokens, _, heads, dimension = x.shape
    half, rows = triton.next_power_of_2(dimension // 2), 3 * heads * tokens
    tile_rows = max(_TILE // half, 1)
    rotary_kernel[(ceil_div(rows, tile_rows),)](
        x, table, y, rows, x.stride(0), table.stride(0),
        INVERSE=inverse, HEADS=3 * heads, D=dimension, HALF=half, ROWS=tile_rows, num_warps=4,
    )  # fmt: skip
