"""y = gelu(u), u = x + bias, and its gradients: one kernel forward, one backward, both bound by memory bandwidth.

The backward pass recomputes u; its programs iterate over the rows of their columns, whose sum is d_bias. T tokens, H
columns; BLOCK and ROWS as in `kernels/column_blocks.py`.
"""

import torch
import triton.language as tl

from bertfast.kernels.column_blocks import load_bias, tile_at, tile_config
from bertfast.kernels.device import ceil_div
from bertfast.kernels.gelu import gelu, gelu_derivative
from bertfast.kernels.jit import kernel
from bertfast.kernels.operation import operation
from bertfast.kernels.rows import in_rows, summing_programs


@kernel
def bias_gelu_forward_kernel(
    x_ptr,  # [T, H], rows x_stride apart
    bias_ptr,  # [H]
    y_ptr,  # [T, H]
    tokens,
    x_stride,
    APPROXIMATE: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute a tile of y."""
    row, column, mask = tile_at(tl.program_id(0), tokens, H, BLOCK, ROWS)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = x + load_bias(bias_ptr, column, H)
    tl.store(y_ptr + row * H + column, gelu(u, APPROXIMATE).to(y_ptr.dtype.element_ty), mask=mask)


@kernel
def bias_gelu_backward_kernel(
    d_y_ptr,  # [T, H], rows d_y_stride apart
    x_ptr,  # as in the forward kernel
    bias_ptr,
    d_x_ptr,  # [T, H]
    sums_ptr,  # fp32 [programs, H]: each program's partial sum of d_bias
    tokens,
    d_y_stride,
    x_stride,
    APPROXIMATE: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute d_x of BLOCK columns in every programs-th tile of rows, and their partial sum, for d_bias."""
    _, column, _ = tile_at(0, tokens, H, BLOCK, ROWS)
    bias = load_bias(bias_ptr, column, H)
    sums = tl.zeros([1, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        row, column, mask = tile_at(tile, tokens, H, BLOCK, ROWS)
        d_y = tl.load(d_y_ptr + row * d_y_stride + column, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        d_x = d_y * gelu_derivative(x + bias, APPROXIMATE)
        tl.store(d_x_ptr + row * H + column, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
        sums += tl.sum(d_x, 0, keep_dims=True)  # a lane holds the same columns of every row
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * H + column, sums, mask=column < H)


@operation
def bias_gelu_forward(x, bias, approximate, *, out):
    """Write y [T, H]."""
    x, y = in_rows(x), out
    tokens, columns = x.shape
    constants = tile_config(columns, x)
    grid = (ceil_div(tokens, constants["ROWS"]), ceil_div(columns, constants["BLOCK"]))
    bias_gelu_forward_kernel[grid](x, bias, y, tokens, x.stride(0), approximate, **constants)


@operation
def bias_gelu_backward(d_y, x, bias, approximate, *, out):
    """Write d_x [T, H] and d_bias, fp32 [H]."""
    d_y, x = in_rows(d_y), in_rows(x)
    d_x, d_bias = out
    tokens, columns = x.shape
    constants = tile_config(columns, d_y, x)
    tiles, blocks = ceil_div(tokens, constants["ROWS"]), ceil_div(columns, constants["BLOCK"])
    programs = ceil_div(summing_programs(tiles * blocks, x.device, constants["num_warps"]), blocks)
    sums = x.new_empty((programs, columns), dtype=torch.float32)
    bias_gelu_backward_kernel[(programs, blocks)](
        d_y, x, bias, d_x, sums, tokens, d_y.stride(0), x.stride(0), approximate, **constants
    )
    torch.sum(sums, 0, out=d_bias)
