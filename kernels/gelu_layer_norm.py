"""y = LN(z), z = gelu(x + bias), exact GELU, and its gradients: one kernel forward, one backward.

z is not stored: the backward pass recomputes it from x. R rows, H hidden size; CHUNK and ROWS as in `kernels/rows.py`.
"""

import torch
import triton
import triton.language as tl

from bertfast.kernels.device import ceil_div
from bertfast.kernels.gelu import gelu, gelu_derivative
from bertfast.kernels.jit import kernel
from bertfast.kernels.operation import operation
from bertfast.kernels.rows import (
    STAGES,
    STAGES_IF_WIDE,
    WIDE,
    add,
    in_rows,
    layer_norm_apply,
    layer_norm_differentiate,
    layer_norm_statistics,
    load_rows,
    load_vector,
    multiply,
    row_config,
    store_rows,
    store_sums,
    summing_programs,
    zeros,
)


@kernel
def gelu_layer_norm_forward_kernel(
    x_ptr,  # [R, H], rows x_stride apart
    bias_ptr,  # [H], or None
    gamma_ptr,  # [H]
    beta_ptr,  # [H], or None
    y_ptr,  # [R, H]
    mean_ptr,  # fp32 [R]
    rstd_ptr,  # fp32 [R]
    count,
    x_stride,
    eps,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute ROWS rows of y and their statistics."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    rows = row < count
    x = load_rows(x_ptr, row * x_stride, rows, H, CHUNK)
    z = _gelu(add(x, load_vector(bias_ptr, H, CHUNK, ROWS)))
    mean, rstd = layer_norm_statistics(z, eps, H, CHUNK)
    gamma, beta = load_vector(gamma_ptr, H, CHUNK, ROWS), load_vector(beta_ptr, H, CHUNK, ROWS)
    store_rows(y_ptr, row * H, rows, layer_norm_apply(z, mean, rstd, gamma, beta), H, CHUNK)
    tl.store(mean_ptr + row, mean, mask=rows)
    tl.store(rstd_ptr + row, rstd, mask=rows)


@kernel
def gelu_layer_norm_backward_kernel(
    d_y_ptr,  # [R, H], rows d_y_stride apart
    x_ptr,  # as in the forward kernel
    bias_ptr,
    gamma_ptr,
    mean_ptr,
    rstd_ptr,
    d_x_ptr,  # [R, H]
    sums_ptr,  # fp32 [programs, 3, H]: each program's partial sums of d_gamma, d_beta and d_bias
    count,
    d_y_stride,
    x_stride,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute d_x of every programs-th tile of rows, and partial sums of the parameters' gradients."""
    bias, gamma = load_vector(bias_ptr, H, CHUNK, ROWS), load_vector(gamma_ptr, H, CHUNK, ROWS)
    gamma_sums, beta_sums, bias_sums = zeros(H, CHUNK, ROWS), zeros(H, CHUNK, ROWS), zeros(H, CHUNK, ROWS)
    stages: tl.constexpr = STAGES if H <= WIDE else STAGES_IF_WIDE
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0), num_stages=stages):
        row = (tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        rows = row < count
        d_y = load_rows(d_y_ptr, row * d_y_stride, rows, H, CHUNK)
        u = add(load_rows(x_ptr, row * x_stride, rows, H, CHUNK), bias)
        mean, rstd = tl.load(mean_ptr + row, mask=rows, other=0.0), tl.load(rstd_ptr + row, mask=rows, other=0.0)
        d_z, d_gamma = layer_norm_differentiate(d_y, _gelu(u), mean, rstd, gamma, H)
        d_x = multiply(d_z, _gelu_derivative(u))
        store_rows(d_x_ptr, row * H, rows, d_x, H, CHUNK)
        gamma_sums, beta_sums, bias_sums = add(gamma_sums, d_gamma), add(beta_sums, d_y), add(bias_sums, d_x)
    sums_ptr += tl.program_id(0).to(tl.int64) * 3 * H
    store_sums(sums_ptr, gamma_sums, H, CHUNK)
    store_sums(sums_ptr + H, beta_sums, H, CHUNK)
    store_sums(sums_ptr + 2 * H, bias_sums, H, CHUNK)


@triton.jit
def _gelu(u):
    """Return the GELU of chunks."""
    z: tl.tuple = ()
    for c in tl.static_range(len(u)):
        z = z + (gelu(u[c], "none"),)
    return z


@triton.jit
def _gelu_derivative(u):
    """Return the derivative of GELU of chunks."""
    derivative: tl.tuple = ()
    for c in tl.static_range(len(u)):
        derivative = derivative + (gelu_derivative(u[c], "none"),)
    return derivative


@operation
def gelu_layer_norm_forward(x, bias, gamma, beta, eps, *, out):
    """Write y [R, H], and mean and rstd of z, fp32 [R]."""
    x = in_rows(x)
    y, mean, rstd = out
    count, hidden = x.shape
    constants = row_config(hidden, x, y)
    gelu_layer_norm_forward_kernel[(ceil_div(count, constants["ROWS"]),)](
        x, bias, gamma, beta, y, mean, rstd, count, x.stride(0), eps, **constants
    )


@operation
def gelu_layer_norm_backward(d_y, x, bias, gamma, mean, rstd, *, out):
    """Write d_x [R, H] and fp32 [3, H] of d_gamma, d_beta and d_bias."""
    d_y, x = in_rows(d_y), in_rows(x)
    d_x, d_parameters = out
    count, hidden = x.shape
    constants = row_config(hidden, d_y, x, summing=True)
    programs = summing_programs(ceil_div(count, constants["ROWS"]), x.device, constants["num_warps"])
    sums = x.new_empty((programs, 3, hidden), dtype=torch.float32)
    gelu_layer_norm_backward_kernel[(programs,)](
        d_y, x, bias, gamma, mean, rstd, d_x, sums, count, d_y.stride(0), x.stride(0), **constants
    )
    torch.sum(sums, 0, out=d_parameters)
