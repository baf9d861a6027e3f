"""y = gelu(x W^T + bias) in one kernel: GELU is the epilogue of the GEMM. The backward pass is that of `bias_gelu`.

It needs x W^T, which cannot be recovered from y, so that is stored too. T tokens, H hidden size, N columns.
"""

import triton.language as tl

from bertfast.kernels.device import ceil_div
from bertfast.kernels.gelu import gelu
from bertfast.kernels.jit import kernel
from bertfast.kernels.operation import operation
from bertfast.kernels.rows import in_rows

# By element size in bytes: tile ROWS x COLUMNS, step DEPTH along H, warps and pipeline stages.
_TILES = {
    2: {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3},
    4: {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "num_warps": 4, "num_stages": 3},
}


@kernel
def linear_gelu_forward_kernel(
    x_ptr,  # [T, H], rows x_stride apart
    weight_ptr,  # [N, H], rows weight_stride apart
    bias_ptr,  # [N]
    y_ptr,  # [T, N]
    gemm_ptr,  # [T, N], x W^T
    tokens,
    x_stride,
    weight_stride,
    APPROXIMATE: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Compute a tile of x W^T and of y."""
    # Grouped order, eight row tiles per column tile: concurrent programs share their operands in L2.
    row_tile, column_tile = tl.swizzle2d(tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), 8)
    row = (row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, DEPTH)[None, :]
    x_ptr += row * x_stride + step
    weight_ptr += column[:, None].to(tl.int64) * weight_stride + step
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, H, DEPTH):
        x = tl.load(x_ptr + start, mask=(row < tokens) & (start + step < H), other=0.0)
        weight = tl.load(weight_ptr + start, mask=(column[:, None] < N) & (start + step < H), other=0.0)
        acc = tl.dot(x, weight.T, acc, input_precision="tf32x3")
    column = column[None, :]
    mask = (row < tokens) & (column < N)
    u = acc + tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    offset = row * N + column
    tl.store(gemm_ptr + offset, acc.to(gemm_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + offset, gelu(u, APPROXIMATE).to(y_ptr.dtype.element_ty), mask=mask)


@operation
def linear_gelu_forward(x, weight, bias, approximate, *, out):
    """Write y and x W^T, both [T, N]."""
    x, weight = in_rows(x), in_rows(weight)
    y, gemm = out
    tokens, columns = y.shape
    tiles = _TILES[x.element_size()]
    grid = (ceil_div(columns, tiles["COLUMNS"]), ceil_div(tokens, tiles["ROWS"]))
    linear_gelu_forward_kernel[grid](
        x, weight, bias, y, gemm, tokens, x.stride(0), weight.stride(0), approximate, x.shape[1], columns, **tiles
    )
