"""y = dropout(LN(z)), z = word[token] + token_type[type] + position[position], and its gradients.

One kernel forward. Backward, one recomputes z and writes its gradient; where there are at most two types, it sums that
of each type in registers as it sums those of gamma and beta. `kernels/sum_by_index.py` sums the gradient of z into the
other tables, with one sort for all of them. T tokens, H hidden size; H, CHUNK and ROWS as in `kernels/rows.py`.
"""

import torch
import triton
import triton.language as tl

from bertfast.kernels.device import ceil_div
from bertfast.kernels.dropout import hidden_factors
from bertfast.kernels.jit import TRITON_VERSION, kernel
from bertfast.kernels.operation import operation
from bertfast.kernels.rows import (
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
from bertfast.kernels.sum_by_index import group_by_index, sum_groups

_TYPES_IN_REGISTERS = 2  # the sums of more token types would spill


@kernel
def embeddings_forward_kernel(
    tables_ptr,  # (word [V, H], or [T, H] without token ids; token_type [types, H]; position [positions, H])
    ids_ptr,  # (token_ids, token_type_ids, position_ids), int [T] each; token_ids may be None
    gamma_ptr,  # [H]
    beta_ptr,  # [H], or None
    rng_ptr,  # (seed int64 [], sequence ids int [T], positions int [T]); seed None: no dropout
    y_ptr,  # [T, H]
    mean_ptr,  # fp32 [T]
    rstd_ptr,  # fp32 [T]
    tokens,
    tables_stride,  # from a row to the next, of each table
    eps,
    counter_word,
    threshold,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute ROWS rows of y and their statistics."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    rows = row < tokens
    z = _gather_all(tables_ptr, ids_ptr, tables_stride, row, rows, H, CHUNK)
    mean, rstd = layer_norm_statistics(z, eps, H, CHUNK)
    gamma, beta = load_vector(gamma_ptr, H, CHUNK, ROWS), load_vector(beta_ptr, H, CHUNK, ROWS)
    y = layer_norm_apply(z, mean, rstd, gamma, beta)
    if rng_ptr[0] is not None:
        y = multiply(y, hidden_factors(row, rows, rng_ptr, counter_word, threshold, H, CHUNK))
    store_rows(y_ptr, row * H, rows, y, H, CHUNK)
    tl.store(mean_ptr + row, mean, mask=rows)
    tl.store(rstd_ptr + row, rstd, mask=rows)


@kernel
def embeddings_backward_kernel(
    d_y_ptr,  # [T, H], rows d_y_stride apart
    tables_ptr,  # as in the forward kernel
    ids_ptr,
    gamma_ptr,
    mean_ptr,
    rstd_ptr,
    rng_ptr,
    d_z_ptr,  # [T, H]
    sums_ptr,  # fp32 [programs, 2 + TYPES, H]: each program's partial sums of d_gamma, d_beta and the types' gradients
    tokens,
    d_y_stride,
    tables_stride,
    counter_word,
    threshold,
    TYPES: tl.constexpr,  # token types whose gradients are summed here; 0: none are
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute d_z of every programs-th tile of rows, and partial sums of the gradients of gamma, beta and the types."""
    gamma = load_vector(gamma_ptr, H, CHUNK, ROWS)
    gamma_sums, beta_sums = zeros(H, CHUNK, ROWS), zeros(H, CHUNK, ROWS)
    type_sums: tl.tuple = ()  # the chunks of type 0, then those of type 1
    for _ in tl.static_range(TYPES):
        type_sums = type_sums + zeros(H, CHUNK, ROWS)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        row = (tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        rows = row < tokens
        d_y = load_rows(d_y_ptr, row * d_y_stride, rows, H, CHUNK)
        z = _gather_all(tables_ptr, ids_ptr, tables_stride, row, rows, H, CHUNK)
        mean, rstd = tl.load(mean_ptr + row, mask=rows, other=0.0), tl.load(rstd_ptr + row, mask=rows, other=0.0)
        if rng_ptr[0] is not None:
            factors = hidden_factors(row, rows, rng_ptr, counter_word, threshold, H, CHUNK)
            d_y = multiply(d_y, factors)
        d_z, d_gamma = layer_norm_differentiate(d_y, z, mean, rstd, gamma, H)
        store_rows(d_z_ptr, row * H, rows, d_z, H, CHUNK)
        gamma_sums, beta_sums = add(gamma_sums, d_gamma), add(beta_sums, d_y)
        if TYPES > 0:
            token_type = tl.load(ids_ptr[1] + row, mask=rows, other=-1)
            type_sums = _add_to_types(type_sums, d_z, token_type, TYPES)
    sums_ptr += tl.program_id(0).to(tl.int64) * (2 + TYPES) * H
    store_sums(sums_ptr, gamma_sums, H, CHUNK)
    store_sums(sums_ptr + H, beta_sums, H, CHUNK)
    for i in tl.static_range(TYPES):
        store_sums(sums_ptr + (2 + i) * H, _chunks_of_type(type_sums, i, TYPES), H, CHUNK)


@triton.jit
def _add_to_types(type_sums, d_z, token_type, TYPES: tl.constexpr):
    """Add each row of `d_z`, chunks [ROWS, CHUNK], to the sums of its `token_type` [ROWS, 1]."""
    result: tl.tuple = ()
    for i in tl.static_range(TYPES):
        sums = _chunks_of_type(type_sums, i, TYPES)
        for c in tl.static_range(len(sums)):
            result = result + (sums[c] + tl.where(token_type == i, d_z[c], 0.0),)
    return result


@triton.jit
def _chunks_of_type(type_sums, i: tl.constexpr, TYPES: tl.constexpr):
    count: tl.constexpr = len(type_sums) // TYPES
    chunks: tl.tuple = ()
    for c in tl.static_range(count):
        chunks = chunks + (type_sums[i * count + c],)
    return chunks


@triton.jit
def _gather_all(tables_ptr, ids_ptr, tables_stride, row, rows, H: tl.constexpr, CHUNK: tl.constexpr):
    """Return the sum of the three embeddings of the tokens `row` [rows, 1], masked by `rows`, in fp32 chunks."""
    z = _gather(tables_ptr[0], ids_ptr[0], row, rows, tables_stride[0], H, CHUNK)
    for i in tl.static_range(1, 3):
        z = add(z, _gather(tables_ptr[i], ids_ptr[i], row, rows, tables_stride[i], H, CHUNK))
    return z


@triton.jit
def _gather(table_ptr, ids_ptr, row, rows, stride, H: tl.constexpr, CHUNK: tl.constexpr):
    """Return table[ids[row]] of the tokens `row` [rows, 1], in fp32 chunks; table[row] without ids."""
    if ids_ptr is not None:
        row = tl.load(ids_ptr + row, mask=rows, other=0).to(tl.int64)
    return load_rows(table_ptr, row * stride, rows, H, CHUNK)


@operation
def embeddings_forward(
    word, position, token_type, token_ids, token_type_ids, position_ids, gamma, beta, eps, seed, sequence_ids,
    positions, counter_word, threshold, *, out,
):  # fmt: skip
    """Write y [T, H], and mean and rstd of z, fp32 [T]."""
    y, mean, rstd = out
    tables = tuple(in_rows(table) for table in (word, token_type, position))
    tokens, hidden = y.shape
    constants = row_config(hidden, *tables)
    embeddings_forward_kernel[(ceil_div(tokens, constants["ROWS"]),)](
        tables, (token_ids, token_type_ids, position_ids), gamma, beta, (seed, sequence_ids, positions), y, mean, rstd,
        tokens, tuple(table.stride(0) for table in tables), eps, counter_word, threshold, **constants,
    )  # fmt: skip


@operation
def embeddings_backward(
    d_y, word, position, token_type, token_ids, token_type_ids, position_ids, gamma, mean, rstd, padding_index,
    seed, sequence_ids, positions, counter_word, threshold,
):  # fmt: skip
    """Return (d_word, d_position, d_token_type, fp32 [2, H] of d_gamma and d_beta); row `padding_index` is zero."""
    d_y = in_rows(d_y)
    tables = tuple(in_rows(table) for table in (word, token_type, position))
    tokens, hidden = d_y.shape
    in_fp32 = any(x.element_size() > 2 for x in (d_y, *tables))
    # With 12 columns of a lane Triton 3.6 and 3.8 spill, and 3.7 does not.
    spills = TRITON_VERSION != (3, 7) and in_fp32 and seed is not None
    constants = row_config(hidden, d_y, *tables, summing=True, warps_share_rows=spills)
    programs = summing_programs(ceil_div(tokens, constants["ROWS"]), d_y.device, constants["num_warps"])
    # As in autograd: the dtype of the sum of the three embeddings, fp32 if any of them is.
    widest = torch.promote_types(torch.promote_types(word.dtype, position.dtype), token_type.dtype)
    d_z = d_y.new_empty(d_y.shape, dtype=widest)
    types = len(token_type) if len(token_type) <= _TYPES_IN_REGISTERS else 0
    sums = d_y.new_empty((programs, 2 + types, hidden), dtype=torch.float32)
    embeddings_backward_kernel[(programs,)](
        d_y, tables, (token_ids, token_type_ids, position_ids), gamma, mean, rstd, (seed, sequence_ids, positions),
        d_z, sums, tokens, d_y.stride(0), tuple(table.stride(0) for table in tables), counter_word, threshold,
        TYPES=types, **constants,
    )  # fmt: skip
    indexed = [] if token_ids is None else [(word, token_ids)]
    indexed += [(position, position_ids)] + ([] if types else [(token_type, token_type_ids)])
    groups = group_by_index([index for _, index in indexed], [len(table) for table, _ in indexed])
    # A negative padding index counts from the end, as in `torch.nn.Embedding`.
    zero_row = -1 if token_ids is None or padding_index is None else padding_index % len(word)
    sizes = [(len(table), table.dtype) for table, _ in indexed]
    gradients = iter(sum_groups(d_z, groups, sizes, zero_row))
    d_word = d_z.to(word.dtype) if token_ids is None else next(gradients)
    d_position = next(gradients)
    d_token_type = sums[:, 2:].sum(0).to(token_type.dtype) if types else next(gradients)
    return d_word, d_position, d_token_type, sums[:, :2].sum(0)
