"""y = act(u) · v, u = x[:, :H] + bias[:H], v = x[:, H:] + bias[H:], and its gradients: one kernel in each direction.

GeGLU and SwiGLU (Shazeer, 2020), bound by memory bandwidth. The backward pass recomputes u, v and act(u); its programs
iterate over the rows of their columns, whose sum is d_bias. T tokens, H columns of y; BLOCK and ROWS as in
`kernels/column_blocks.py`.
"""

import torch
import triton
import triton.language as tl

from bertfast.kernels.column_blocks import load_bias, tile_at, tile_config
from bertfast.kernels.device import ceil_div
from bertfast.kernels.gelu import activate
from bertfast.kernels.jit import kernel
from bertfast.kernels.operation import operation
from bertfast.kernels.rows import in_rows, summing_programs

_ROWS = 2  # of a tile, which has as many loads of x as four rows of one column block


@kernel
def gated_activation_forward_kernel(
    x_ptr,  # [T, 2 H], rows x_stride apart
    bias_ptr,  # [2 H], or None
    y_ptr,  # [T, H]
    tokens,
    x_stride,
    ACTIVATION: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute a tile of y."""
    row, column, mask = tile_at(tl.program_id(0), tokens, H, BLOCK, ROWS)
    u, v = _load_halves(x_ptr + row * x_stride + column, mask, H)
    if bias_ptr is not None:
        u += load_bias(bias_ptr, column, H)
        v += load_bias(bias_ptr + H, column, H)
    activated, _ = activate(u, ACTIVATION)
    tl.store(y_ptr + row * H + column, (activated * v).to(y_ptr.dtype.element_ty), mask=mask)


@kernel
def gated_activation_backward_kernel(
    d_y_ptr,  # [T, H], rows d_y_stride apart
    x_ptr,  # as in the forward kernel
    bias_ptr,
    d_x_ptr,  # [T, 2 H]
    sums_ptr,  # fp32 [programs, 2 H]: each program's partial sum of d_bias; None without a bias
    tokens,
    d_y_stride,
    x_stride,
    ACTIVATION: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute d_x of BLOCK columns of both halves in every programs-th tile of rows, and their partial sums."""
    _, column, _ = tile_at(0, tokens, H, BLOCK, ROWS)
    if bias_ptr is not None:
        bias, gate_bias = load_bias(bias_ptr, column, H), load_bias(bias_ptr + H, column, H)
        sums, gate_sums = tl.zeros([1, BLOCK], tl.float32), tl.zeros([1, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        row, column, mask = tile_at(tile, tokens, H, BLOCK, ROWS)
        d_y = tl.load(d_y_ptr + row * d_y_stride + column, mask=mask, other=0.0).to(tl.float32)
        u, v = _load_halves(x_ptr + row * x_stride + column, mask, H)
        if bias_ptr is not None:
            u += bias
            v += gate_bias
        activated, derivative = activate(u, ACTIVATION)
        d_u, d_v = d_y * v * derivative, d_y * activated
        d_x = d_x_ptr + row * (2 * H) + column
        tl.store(d_x, d_u.to(d_x_ptr.dtype.element_ty), mask=mask)
        tl.store(d_x + H, d_v.to(d_x_ptr.dtype.element_ty), mask=mask)
        if bias_ptr is not None:  # a lane holds the same columns of every row
            sums += tl.sum(d_u, 0, keep_dims=True)
            gate_sums += tl.sum(d_v, 0, keep_dims=True)
    if bias_ptr is not None:
        sums_ptr += tl.program_id(0).to(tl.int64) * 2 * H
        tl.store(sums_ptr + column, sums, mask=column < H)
        tl.store(sums_ptr + H + column, gate_sums, mask=column < H)


@triton.jit
def _load_halves(pointers, mask, H: tl.constexpr):
    """Load the elements of x at `pointers`, and those H columns further, as fp32."""
    u = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return u, tl.load(pointers + H, mask=mask, other=0.0).to(tl.float32)


@operation
def gated_activation_forward(x, bias, activation, *, out):
    """Write y [T, H]."""
    x, y = in_rows(x), out
    tokens, columns = y.shape
    constants = tile_config(columns, x, rows=_ROWS)
    grid = (ceil_div(tokens, constants["ROWS"]), ceil_div(columns, constants["BLOCK"]))
    gated_activation_forward_kernel[grid](x, bias, y, tokens, x.stride(0), activation, **constants)


@operation
def gated_activation_backward(d_y, x, bias, activation, *, out):
    """Write d_x [T, 2 H] and d_bias, fp32 [2 H], if there is a bias."""
    d_y, x = in_rows(d_y), in_rows(x)
    d_x, d_bias = out
    tokens, columns = d_y.shape
    constants = tile_config(columns, d_y, x, rows=_ROWS)
    tiles, blocks = ceil_div(tokens, constants["ROWS"]), ceil_div(columns, constants["BLOCK"])
    programs = ceil_div(summing_programs(tiles * blocks, x.device, constants["num_warps"]), blocks)
    sums = None if bias is None else x.new_empty((programs, 2 * columns), dtype=torch.float32)
    gated_activation_backward_kernel[(programs, blocks)](
        d_y, x, bias, d_x, sums, tokens, d_y.stride(0), x.stride(0), activation, **constants
    )
    if sums is not None:
        torch.sum(sums, 0, out=d_bias)
