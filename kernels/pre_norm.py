"""stream = residual + dropout(x + bias) and its norm, LN(stream) or RMSNorm(stream), and their gradients.

One kernel forward, one backward. The statistics are those of the stream as it is stored, rounded to its dtype, so the
backward pass reads the stream and neither x nor residual. T tokens, H hidden size; H, CHUNK and ROWS as in
`kernels/rows.py`.
"""

import torch
import triton
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
    rms_norm_apply,
    rms_norm_differentiate,
    rms_norm_statistic,
    row_config,
    store_rows,
    store_sums,
    summing_programs,
    zeros,
)


@kernel
def pre_norm_forward_kernel(
    residual_ptr,  # [T, H], rows residual_stride apart
    x_ptr,  # [T, H], rows x_stride apart; None: nothing is added, and the residual is the stream
    bias_ptr,  # [H], or None
    gamma_ptr,  # [H]
    beta_ptr,  # [H], or None
    rng_ptr,  # (seed int64 [], sequence ids int [T], positions int [T]); seed None: no dropout
    stream_ptr,  # [T, H], written if there is x
    normed_ptr,  # [T, H]
    mean_ptr,  # fp32 [T], written unless RMS
    rstd_ptr,  # fp32 [T]
    tokens,
    residual_stride,
    x_stride,
    eps,
    counter_word,
    threshold,
    RMS: tl.constexpr,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute ROWS rows of the stream and its norm, and their statistics."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    rows = row < tokens
    stream = load_rows(residual_ptr, row * residual_stride, rows, H, CHUNK)
    if x_ptr is not None:
        x = load_rows(x_ptr, row * x_stride, rows, H, CHUNK)
        if bias_ptr is not None:
            x = add(x, load_vector(bias_ptr, H, CHUNK, ROWS))
        if rng_ptr[0] is not None:
            x = multiply(x, hidden_factors(row, rows, rng_ptr, counter_word, threshold, H, CHUNK))
        stream = _as_stored(add(stream, x), stream_ptr)
        store_rows(stream_ptr, row * H, rows, stream, H, CHUNK)
    gamma = load_vector(gamma_ptr, H, CHUNK, ROWS)
    if RMS:
        rstd = rms_norm_statistic(stream, eps, H)
        normed = rms_norm_apply(stream, rstd, gamma)
    else:
        mean, rstd = layer_norm_statistics(stream, eps, H, CHUNK)
        normed = layer_norm_apply(stream, mean, rstd, gamma, load_vector(beta_ptr, H, CHUNK, ROWS))
        tl.store(mean_ptr + row, mean, mask=rows)
    store_rows(normed_ptr, row * H, rows, normed, H, CHUNK)
    tl.store(rstd_ptr + row, rstd, mask=rows)


@triton.jit
def _as_stored(chunks, pointer):
    """Return fp32 chunks rounded to the dtype of a pointer."""
    rounded: tl.tuple = ()
    for c in tl.static_range(len(chunks)):
        rounded = rounded + (chunks[c].to(pointer.dtype.element_ty).to(tl.float32),)
    return rounded


@kernel
def pre_norm_backward_kernel(
    stream_ptr,  # [T, H], rows stream_stride apart
    d_stream_ptr,  # [T, H], rows d_stream_stride apart; None: zeros
    d_normed_ptr,  # [T, H], rows d_normed_stride apart; None: zeros
    gamma_ptr,  # [H]
    mean_ptr,  # fp32 [T], not read if RMS
    rstd_ptr,  # fp32 [T]
    rng_ptr,  # as in the forward kernel
    d_x_ptr,  # [T, H]; None if it equals d_residual or there is no x
    d_residual_ptr,  # [T, H]
    sums_ptr,  # fp32 [programs, 3, H]: each program's partial sums of d_gamma, d_beta and d_bias
    tokens,
    stream_stride,
    d_stream_stride,
    d_normed_stride,
    counter_word,
    threshold,
    RMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
        d_z = zeros(H, CHUNK, ROWS)
        if d_normed_ptr is not None:
            d_normed = load_rows(d_normed_ptr, row * d_normed_stride, rows, H, CHUNK)
            stream = load_rows(stream_ptr, row * stream_stride, rows, H, CHUNK)
            rstd = tl.load(rstd_ptr + row, mask=rows, other=0.0)
            if RMS:
                d_z, d_gamma = rms_norm_differentiate(d_normed, stream, rstd, gamma, H)
            else:
                mean = tl.load(mean_ptr + row, mask=rows, other=0.0)
                d_z, d_gamma = layer_norm_differentiate(d_normed, stream, mean, rstd, gamma, H)
                beta_sums = add(beta_sums, d_normed)
            gamma_sums = add(gamma_sums, d_gamma)
        if d_stream_ptr is not None:
            d_z = add(d_z, load_rows(d_stream_ptr, row * d_stream_stride, rows, H, CHUNK))
        store_rows(d_residual_ptr, row * H, rows, d_z, H, CHUNK)
        if rng_ptr[0] is not None:
            d_z = multiply(d_z, hidden_factors(row, rows, rng_ptr, counter_word, threshold, H, CHUNK))
        if d_x_ptr is not None:
            store_rows(d_x_ptr, row * H, rows, d_z, H, CHUNK)
        if HAS_BIAS:
            bias_sums = add(bias_sums, d_z)
    sums_ptr += tl.program_id(0).to(tl.int64) * 3 * H
    store_sums(sums_ptr, gamma_sums, H, CHUNK)
    store_sums(sums_ptr + H, beta_sums, H, CHUNK)
    store_sums(sums_ptr + 2 * H, bias_sums, H, CHUNK)


@operation
def pre_norm_forward(
    residual, x, bias, gamma, beta, eps, rms, norm_dtype, seed, sequence_ids, positions, counter_word, threshold, *,
    out,
):  # fmt: skip
    """Write the stream [T, H] if there is x, its norm [T, H], the mean unless `rms` and rstd, fp32 [T]."""
    residual, x = in_rows(residual), None if x is None else in_rows(x)
    stream, normed, mean, rstd = out
    tokens, hidden = residual.shape
    constants = row_config(hidden, *(tensor for tensor in (residual, x, normed) if tensor is not None))
    pre_norm_forward_kernel[(ceil_div(tokens, constants["ROWS"]),)](
        residual, x, bias, gamma, beta, (seed, sequence_ids, positions), stream, normed, mean, rstd,
        tokens, residual.stride(0), 0 if x is None else x.stride(0), eps, counter_word, threshold, rms, **constants,
    )  # fmt: skip


@operation
def pre_norm_backward(
    stream, d_stream, d_normed, gamma, mean, rstd, rms, has_bias, x_dtype, seed, sequence_ids, positions,
    counter_word, threshold, *, out,
):  # fmt: skip
    """Write d_x unless that is empty, d_residual, and fp32 [3, H] of d_gamma, d_beta and d_bias."""
    stream = in_rows(stream)
    d_stream, d_normed = (None if d is None else in_rows(d) for d in (d_stream, d_normed))
    strides = (0 if d is None else d.stride(0) for d in (d_stream, d_normed))
    d_x, d_residual, d_parameters = out
    tokens, hidden = stream.shape
    read = (tensor for tensor in (stream, d_stream, d_normed) if tensor is not None)
    spills = rms and seed is not None  # if a lane has 12 columns
    constants = row_config(hidden, *read, summing=True, warps_share_rows=spills)
    programs = summing_programs(ceil_div(tokens, constants["ROWS"]), stream.device, constants["num_warps"])
    sums = stream.new_empty((programs, 3, hidden), dtype=torch.float32)
    pre_norm_backward_kernel[(programs,)](
        stream, d_stream, d_normed, gamma, mean, rstd, (seed, sequence_ids, positions),
        d_x if d_x.numel() else None, d_residual, sums,
        tokens, stream.stride(0), *strides, counter_word, threshold, rms, has_bias, **constants,
    )  # fmt: skip
    torch.sum(sums, 0, out=d_parameters)
