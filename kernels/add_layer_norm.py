"""y = LN(z), z = residual + dropout(x + bias), and its gradients: one kernel forward, one backward.

z is not stored: the backward pass recomputes it from x and residual, which saves a write and a rounding. T tokens, H
hidden size; H, CHUNK and ROWS as in `kernels/rows.py`.
"""

import torch
import triton.language as tl

from bertfast.kernels.device import ceil_div
from bertfast.kernels.dropout import hidden_factors
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
def add_layer_norm_forward_kernel(
    x_ptr,  # [T, H], rows x_stride apart
    residual_ptr,  # [T, H], rows residual_stride apart
    bias_ptr,  # [H], or None
    gamma_ptr,  # [H]
    beta_ptr,  # [H], or None
    rng_ptr,  # (seed int64 [], sequence ids int [T], positions int [T]); seed None: no dropout
    y_ptr,  # [T, H]
    copy_ptr,  # [T, H], y in the dtype that the next GEMM reads; None: no copy
    mean_ptr,  # fp32 [T]
    rstd_ptr,  # fp32 [T]
    tokens,
    x_stride,
    residual_stride,
    eps,
    counter_word,
    threshold,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute ROWS rows of y and its copy, and their statistics."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    rows = row < tokens
    x = load_rows(x_ptr, row * x_stride, rows, H, CHUNK)
    residual = load_rows(residual_ptr, row * residual_stride, rows, H, CHUNK)
    if bias_ptr is not None:
        x = add(x, load_vector(bias_ptr, H, CHUNK, ROWS))
    if rng_ptr[0] is not None:
        x = multiply(x, hidden_factors(row, rows, rng_ptr, counter_word, threshold, H, CHUNK))
    z = add(residual, x)
    mean, rstd = layer_norm_statistics(z, eps, H, CHUNK)
    gamma, beta = load_vector(gamma_ptr, H, CHUNK, ROWS), load_vector(beta_ptr, H, CHUNK, ROWS)
    y = layer_norm_apply(z, mean, rstd, gamma, beta)
    store_rows(y_ptr, row * H, rows, y, H, CHUNK)
    if copy_ptr is not None:
        store_rows(copy_ptr, row * H, rows, y, H, CHUNK)
    tl.store(mean_ptr + row, mean, mask=rows)
    tl.store(rstd_ptr + row, rstd, mask=rows)


@kernel
def add_layer_norm_backward_kernel(
    d_y_ptr,  # [T, H], rows d_y_stride apart
    d_copy_ptr,  # [T, H], rows d_copy_stride apart: the copy's gradient, added to d_y; None: nothing to add
    x_ptr,  # as in the forward kernel
    residual_ptr,
    bias_ptr,
    gamma_ptr,
    mean_ptr,
    rstd_ptr,
    rng_ptr,
    d_x_ptr,  # [T, H]; None if it equals d_residual
    d_residual_ptr,  # [T, H]
    sums_ptr,  # fp32 [programs, 3, H]: each program's partial sums of d_gamma, d_beta and d_bias
    tokens,
    d_y_stride,
    d_copy_stride,
    x_stride,
    residual_stride,
    counter_word,
    threshold,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute d_x and d_residual of every programs-th tile of rows, and partial sums of the parameters' gradients."""
    gamma = load_vector(gamma_ptr, H, CHUNK, ROWS)
    gamma_sums, beta_sums, bias_sums = zeros(H, CHUNK, ROWS), zeros(H, CHUNK, ROWS), zeros(H, CHUNK, ROWS)
    stages: tl.constexpr = STAGES if H <= WIDE else STAGES_IF_WIDE
    for tile in tl.range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0), num_stages=stages):
        row = (tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        rows = row < tokens
        d_y = load_rows(d_y_ptr, row * d_y_stride, rows, H, CHUNK)
        if d_copy_ptr is not None:
            d_y = add(d_y, load_rows(d_copy_ptr, row * d_copy_stride, rows, H, CHUNK))
        x = load_rows(x_ptr, row * x_stride, rows, H, CHUNK)
        residual = load_rows(residual_ptr, row * residual_stride, rows, H, CHUNK)
        mean, rstd = tl.load(mean_ptr + row, mask=rows, other=0.0), tl.load(rstd_ptr + row, mask=rows, other=0.0)
        if bias_ptr is not None:
            x = add(x, load_vector(bias_ptr, H, CHUNK, ROWS))
        if rng_ptr[0] is not None:
            factors = hidden_factors(row, rows, rng_ptr, counter_word, threshold, H, CHUNK)
            x = multiply(x, factors)
        d_z, d_gamma = layer_norm_differentiate(d_y, add(residual, x), mean, rstd, gamma, H)
        store_rows(d_residual_ptr, row * H, rows, d_z, H, CHUNK)
        if rng_ptr[0] is not None:
            d_z = multiply(d_z, factors)
        if d_x_ptr is not None:
            store_rows(d_x_ptr, row * H, rows, d_z, H, CHUNK)
        gamma_sums, beta_sums = add(gamma_sums, d_gamma), add(beta_sums, d_y)
        if bias_ptr is not None:
            bias_sums = add(bias_sums, d_z)
    sums_ptr += tl.program_id(0).to(tl.int64) * 3 * H
    store_sums(sums_ptr, gamma_sums, H, CHUNK)
    store_sums(sums_ptr + H, beta_sums, H, CHUNK)
    store_sums(sums_ptr + 2 * H, bias_sums, H, CHUNK)


@operation
def add_layer_norm_forward(
    x, residual, bias, gamma, beta, eps, seed, sequence_ids, positions, counter_word, threshold, copy_dtype=None, *,
    out,
):  # fmt: skip
    """Write y [T, H], mean and rstd of z, fp32 [T], and y in `copy_dtype` if that is given."""
    x, residual = in_rows(x), in_rows(residual)
    y, mean, rstd, copy = out
    tokens, hidden = x.shape
    constants = row_config(hidden, x, residual)
    add_layer_norm_forward_kernel[(ceil_div(tokens, constants["ROWS"]),)](
        x, residual, bias, gamma, beta, (seed, sequence_ids, positions),
        y, None if copy_dtype is None else copy, mean, rstd,
        tokens, x.stride(0), residual.stride(0), eps, counter_word, threshold, **constants,
    )  # fmt: skip


@operation
def add_layer_norm_backward(
    d_y, x, residual, bias, gamma, mean, rstd, seed, sequence_ids, positions, counter_word, threshold, d_copy=None,
    *, out,
):  # fmt: skip
    """Write d_x unless it equals d_residual, d_residual, and fp32 [3, H] of d_gamma, d_beta and d_bias.

    `d_copy` [T, H] is added to `d_y` in registers. If only the copy has a gradient, it is passed as `d_y`.
    """
    d_copy = None if d_copy is None else in_rows(d_copy)
    d_copy_stride = 0 if d_copy is None else d_copy.stride(0)
    d_y, x, residual = in_rows(d_y), in_rows(x), in_rows(residual)
    d_x, d_residual, d_parameters = out
    tokens, hidden = x.shape
    constants = row_config(hidden, d_y, x, residual, summing=True)
    programs = summing_programs(ceil_div(tokens, constants["ROWS"]), x.device, constants["num_warps"])
    sums = x.new_empty((programs, 3, hidden), dtype=torch.float32)
    add_layer_norm_backward_kernel[(programs,)](
        d_y, d_copy, x, residual, bias, gamma, mean, rstd, (seed, sequence_ids, positions),
        d_x if d_x.numel() else None, d_residual, sums,
        tokens, d_y.stride(0), d_copy_stride, x.stride(0), residual.stride(0), counter_word, threshold, **constants,
    )  # fmt: skip
    torch.sum(sums, 0, out=d_parameters)
