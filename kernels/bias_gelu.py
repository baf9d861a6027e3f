"""y = gelu(u), u = x + bias, and its gradients: one kernel forward, one backward, both bound by memory bandwidth.

A tile is a block of columns of several rows. The backward pass recomputes u; its programs iterate over the rows of
their columns, whose sum is d_bias. T tokens, H columns; BLOCK columns and ROWS rows of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertfast.kernels.device import ceil_div
from bertfast.kernels.gelu import gelu, gelu_derivative
from bertfast.kernels.jit import kernel
from bertfast.kernels.operation import operation
from bertfast.kernels.rows import in_rows, summing_programs

_ROWS = 4  # of a tile: loads of 16 bytes in flight per lane


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
    row, column, mask = _tile(tl.program_id(0), tokens, H, BLOCK, ROWS)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = x + _load_bias(bias_ptr, column, H)
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
    _, column, _ = _tile(0, tokens, H, BLOCK, ROWS)
    bias = _load_bias(bias_ptr, column, H)
    sums = tl.zeros([1, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        row, column, mask = _tile(tile, tokens, H, BLOCK, ROWS)
        d_y = tl.load(d_y_ptr + row * d_y_stride + column, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        d_x = d_y * gelu_derivative(x + bias, APPROXIMATE)
        tl.store(d_x_ptr + row * H + column, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
        sums += tl.sum(d_x, 0, keep_dims=True)  # a lane holds the same columns of every row
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * H + column, sums, mask=column < H)


@triton.jit
def _tile(tile, tokens, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Return (row int64 [ROWS, 1], column [1, BLOCK], mask) of the tile-th group of rows and the program's columns."""
    row = (tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    if H % BLOCK == 0:
        return row, column, row < tokens
    else:
        return row, column, (row < tokens) & (column < H)


@triton.jit
def _load_bias(bias_ptr, column, H: tl.constexpr):
    return tl.load(bias_ptr + column, mask=column < H, other=0.0).to(tl.float32)


@operation
def bias_gelu_forward(x, bias, approximate, *, out):
    """Write y [T, H]."""
    x, y = in_rows(x), out
    tokens, columns = x.shape
    constants = _tile_config(columns, x)
    grid = (ceil_div(tokens, _ROWS), ceil_div(columns, constants["BLOCK"]))
    bias_gelu_forward_kernel[grid](x, bias, y, tokens, x.stride(0), approximate, **constants)


@operation
def bias_gelu_backward(d_y, x, bias, approximate, *, out):
    """Write d_x [T, H] and d_bias, fp32 [H]."""
    d_y, x = in_rows(d_y), in_rows(x)
    d_x, d_bias = out
    tokens, columns = x.shape
    constants = _tile_config(columns, d_y, x)
    tiles, blocks = ceil_div(tokens, _ROWS), ceil_div(columns, constants["BLOCK"])
    programs = ceil_div(summing_programs(tiles * blocks, x.device), blocks)
    sums = x.new_empty((programs, columns), dtype=torch.float32)
    bias_gelu_backward_kernel[(programs, blocks)](
        d_y, x, bias, d_x, sums, tokens, d_y.stride(0), x.stride(0), approximate, **constants
    )
    torch.sum(sums, 0, out=d_bias)


def _tile_config(columns: int, *tensors: Tensor) -> dict[str, int]:
    """Return H, BLOCK, ROWS and num_warps: a lane loads 16 bytes of each row of a tile."""
    lane = 16 // max(tensor.element_size() for tensor in tensors)
    padded = triton.next_power_of_2(columns)
    block = next((size for size in (1024, 512, 256, 128) if columns % size == 0), min(padded, 1024))
    return {"H": columns, "BLOCK": block, "ROWS": _ROWS, "num_warps": max(min(block // (32 * lane), 8), 1)}
