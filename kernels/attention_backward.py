"""The gradients of attention: d_q, d_k and d_v of each sequence, from q, k, v, o and the scores' log-sum-exp.

With P the probabilities, K the dropout mask, c its scale, d_p = d_o vᵀ and delta the sums of d_o · o (Dao et al.,
2022, appendix B.2): d_v = c (K P)ᵀ d_o, d_s = P (c K d_p - delta), d_q = d_s k · scale, d_k = d_sᵀ q · scale.
A short sequence is one program per head, with five matmuls on tiles that it holds; longer ones take two kernels, one
over queries and one over keys. There are no atomic operations. T, S, A and D as in `attention.py`.
"""

import torch
import triton
import triton.language as tl

from bertfast.kernels.attention import (
    LOG2_E,
    PADDING_PROGRAMS,
    attention_mask,
    blocks_per_tile,
    constants_of,
    dense_tokens,
    find_block,
    kv_range,
    load_block,
    store_block,
    window_or_unlimited,
)
from bertfast.kernels.attention_shapes import shapes
from bertfast.kernels.dropout import attention_dropout, keep_attention
from bertfast.kernels.jit import kernel
from bertfast.kernels.operation import operation


@triton.jit
def _q_range(
    first, length, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):
    """Return (begin, end) of the queries that attend to a block of keys."""
    begin, end = 0, length
    if WINDOW:
        begin = tl.maximum(first - window, 0)
        end = tl.minimum(first + BLOCK_N + window, length)
    if CAUSAL:
        begin = first
    return begin // BLOCK_M * BLOCK_M, end


@triton.jit
def _add_d_q(
    d_q,  # [M, D], the sum so far
    q,  # [M, D]
    d_o,  # [M, D]
    lse,  # [M]
    delta,  # [M]
    k_ptr,
    v_ptr,
    key,  # first key of the block
    first,  # first query
    length,
    qkv_stride,
    scale,
    window,
    rng,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Return d_q plus the contribution of one more block of keys, without the factors c and scale."""
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    k = load_block(k_ptr, key, columns, length, qkv_stride, D, MASKED)
    v = load_block(v_ptr, key, columns, length, qkv_stride, D, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
    p = tl.math.exp2(s - lse[:, None])
    if MASKED:  # masked scores may be infinite here
        mask = attention_mask((first + rows)[:, None], (key + columns)[None, :], length, window, CAUSAL, WINDOW)
        p = tl.where(mask, p, 0.0)
    d_p = tl.dot(d_o, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        keep = keep_attention(first, rows[:, None], key, columns[None, :], rng)
        d_p = tl.where(keep, d_p, 0.0)
    d_s = p * (d_p - delta[:, None])
    return tl.dot(d_s.to(k.dtype), k, d_q, input_precision=PRECISION)


@triton.jit
def _sum_d_q(
    q,  # as in `_add_d_q`
    d_o,
    lse,
    delta,
    k_ptr,
    v_ptr,
    first,
    length,
    qkv_stride,
    scale,
    window,
    rng,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Return the sum of the contributions of all keys to d_q, without the factors c and scale."""
    d_q = tl.zeros([BLOCK_M, D], tl.float32)
    if CAUSAL or WINDOW or not SPLIT:
        begin, end = kv_range(first, length, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
        for key in tl.range(begin, end, BLOCK_N):
            d_q = _add_d_q(
                d_q, q, d_o, lse, delta, k_ptr, v_ptr, key, first, length, qkv_stride, scale, window, rng,
                D, BLOCK_M, BLOCK_N, True, CAUSAL, WINDOW, PRECISION, DROPOUT,
            )  # fmt: skip
    else:
        full = length // BLOCK_N * BLOCK_N
        for key in tl.range(0, full, BLOCK_N):
            d_q = _add_d_q(
                d_q, q, d_o, lse, delta, k_ptr, v_ptr, key, first, length, qkv_stride, scale, window, rng,
                D, BLOCK_M, BLOCK_N, False, CAUSAL, WINDOW, PRECISION, DROPOUT,
            )  # fmt: skip
        if full != length:
            d_q = _add_d_q(
                d_q, q, d_o, lse, delta, k_ptr, v_ptr, full, first, length, qkv_stride, scale, window, rng,
                D, BLOCK_M, BLOCK_N, True, CAUSAL, WINDOW, PRECISION, DROPOUT,
            )  # fmt: skip
    return d_q


@kernel
def attention_d_q_kernel(
    qkv_ptr,  # as in the forward kernel
    o_ptr,
    d_o_ptr,  # [T, A, D]
    lse_ptr,
    tile_ptr,
    sequence_id_ptr,
    seed_ptr,
    delta_ptr,  # fp32 [A, T], written for the next kernel: row sum of d_o · o, divided by the dropout scale
    d_qkv_ptr,  # [T, 3, A, D], of which this writes d_q
    tiles,
    capacity,
    heads,
    qkv_stride,
    scale,
    window,
    counter_word,
    threshold,
    min_length,  # shorter sequences belong to another kernel
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of queries in a tile
    SPLIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute delta and d_q of a block of queries of one head."""
    DROPOUT: tl.constexpr = seed_ptr is not None
    head = tl.program_id(0) % heads
    sequence, start, length, first = find_block(tile_ptr, tiles, tl.program_id(0) // heads, BLOCK_M, BLOCKS)
    if (first >= length) | (length < min_length):
        return
    rows = tl.arange(0, BLOCK_M)
    o_stride = heads * D
    d_stride = 3 * o_stride
    q_ptr = qkv_ptr + start * qkv_stride + head * D
    k_ptr = q_ptr + heads * D
    v_ptr = k_ptr + heads * D
    q = load_block(q_ptr, first, rows, length, qkv_stride, D)
    d_o = load_block(d_o_ptr + start * o_stride + head * D, first, rows, length, o_stride, D)
    o = load_block(o_ptr + start * o_stride + head * D, first, rows, length, o_stride, D)
    rng, c = attention_dropout(seed_ptr, sequence_id_ptr + sequence, counter_word | head, threshold)
    inside = first + rows < length
    statistics = head.to(tl.int64) * capacity + start + first + rows
    lse = tl.load(lse_ptr + statistics, mask=inside, other=float("inf"))
    delta = tl.sum(d_o.to(tl.float32) * o.to(tl.float32), 1) / c
    tl.store(delta_ptr + statistics, delta, mask=inside)
    d_q = _sum_d_q(
        q, d_o, lse, delta, k_ptr, v_ptr, first, length, qkv_stride, scale, window, rng,
        D, BLOCK_M, BLOCK_N, SPLIT, CAUSAL, WINDOW, PRECISION, DROPOUT,
    )  # fmt: skip
    # The factor c, left out of d_s, is applied last.
    store_block(d_qkv_ptr + start * d_stride + head * D, first, rows, length, d_stride, d_q * (scale * c), D)


@triton.jit
def _probabilities(
    q,  # [M, D]
    k,  # [N, D]
    lse,  # [M]
    query,  # first query
    key,  # first key
    length,
    scale,
    window,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Recompute the transposed probabilities [N, M]."""
    p = tl.math.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E) - lse[None, :])
    if MASKED:
        rows, columns = tl.arange(0, p.shape[0]), tl.arange(0, p.shape[1])
        mask = attention_mask((query + columns)[None, :], (key + rows)[:, None], length, window, CAUSAL, WINDOW)
        p = tl.where(mask, p, 0.0)
    return p


@triton.jit
def _negate_dropped(p, query, key, rng, DROPOUT: tl.constexpr):
    """Return p [N, M] with the dropout mask in the sign bit, which takes no register."""
    if DROPOUT:
        rows, columns = tl.arange(0, p.shape[0]), tl.arange(0, p.shape[1])
        p = tl.where(keep_attention(query, columns[None, :], key, rows[:, None], rng), p, -p)
    return p


@triton.jit
def _score_gradients(p, d_p, delta):
    """Return d_s [N, M] from p of `_negate_dropped`, d_p [N, M] and delta [M], without the factors c and scale."""
    return tl.abs(p) * (tl.where(p > 0, d_p, 0.0) - delta[None, :])


@kernel
def attention_d_kv_kernel(
    qkv_ptr,  # as in the kernels before
    d_o_ptr,
    lse_ptr,
    delta_ptr,
    tile_ptr,
    sequence_id_ptr,
    seed_ptr,
    d_qkv_ptr,  # of which this writes d_k and d_v
    tiles,
    capacity,
    heads,
    qkv_stride,
    scale,
    window,
    counter_word,
    threshold,
    min_length,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of keys in a tile
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute d_k and d_v of a block of keys of one head. Scores are [keys, queries]: no left operand is transposed."""
    head = tl.program_id(0) % heads
    sequence, start, length, first = find_block(tile_ptr, tiles, tl.program_id(0) // heads, BLOCK_N, BLOCKS)
    if (first >= length) | (length < min_length):
        return
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    o_stride, d_stride = heads * D, 3 * heads * D
    q_ptr = qkv_ptr + start * qkv_stride + head * D
    k = load_block(q_ptr + heads * D, first, rows, length, qkv_stride, D)
    v = load_block(q_ptr + 2 * heads * D, first, rows, length, qkv_stride, D)
    d_o_ptr += start * o_stride + head * D
    rng, c = attention_dropout(seed_ptr, sequence_id_ptr + sequence, counter_word | head, threshold)
    d_k, d_v = tl.zeros([BLOCK_N, D], tl.float32), tl.zeros([BLOCK_N, D], tl.float32)
    begin, end = _q_range(first, length, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    for query in tl.range(begin, end, BLOCK_M):
        q = load_block(q_ptr, query, columns, length, qkv_stride, D)
        d_o = load_block(d_o_ptr, query, columns, length, o_stride, D)
        inside = query + columns < length
        statistics = head.to(tl.int64) * capacity + start + query + columns
        lse = tl.load(lse_ptr + statistics, mask=inside, other=float("inf"))  # p is 0 beyond the sequence's end
        delta = tl.load(delta_ptr + statistics, mask=inside, other=0.0)
        p = _probabilities(q, k, lse, query, first, length, scale, window, CAUSAL or WINDOW, CAUSAL, WINDOW, PRECISION)
        p = _negate_dropped(p, query, first, rng, seed_ptr is not None)
        d_v = tl.dot(tl.maximum(p, 0.0).to(d_o.dtype), d_o, d_v, input_precision=PRECISION)
        d_s = _score_gradients(p, tl.dot(v, tl.trans(d_o), input_precision=PRECISION), delta)
        d_k = tl.dot(d_s.to(q.dtype), q, d_k, input_precision=PRECISION)
    d_k_ptr = d_qkv_ptr + start * d_stride + (heads + head) * D
    store_block(d_k_ptr, first, rows, length, d_stride, d_k * (scale * c), D)
    store_block(d_k_ptr + heads * D, first, rows, length, d_stride, d_v * c, D)


@triton.jit
def _zero_rows(d_q_ptr, first, length, step, d_stride, part_stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """Zero d_q, d_k and d_v, `part_stride` apart, of BLOCK rows at `first`, `first` + `step`, … up to `length`."""
    rows, zero = tl.arange(0, BLOCK), tl.zeros([BLOCK, D], tl.float32)
    for row in range(first, length, step):
        for part in tl.static_range(3):
            store_block(d_q_ptr + part * part_stride, row, rows, length, d_stride, zero, D)


@kernel
def attention_backward_short_kernel(
    qkv_ptr,  # as in the kernels before
    o_ptr,
    d_o_ptr,
    lse_ptr,
    tile_ptr,
    sequence_id_ptr,
    seed_ptr,
    d_qkv_ptr,  # written for sequences of at most BLOCK tokens, and zeroed for the padding slots
    tiles,
    capacity,
    heads,
    qkv_stride,
    scale,
    window,
    counter_word,
    threshold,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    PADDING_PROGRAMS: tl.constexpr,
):
    """Compute d_q, d_k and d_v of one head of a sequence of at most BLOCK tokens."""
    DROPOUT: tl.constexpr = seed_ptr is not None
    head = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    sequence, start, length, first = find_block(tile_ptr, tiles, slot, BLOCK, 1)
    rows = tl.arange(0, BLOCK)
    o_stride = heads * D
    d_stride = 3 * o_stride
    d_q_ptr = d_qkv_ptr + start * d_stride + head * D
    if slot >= tiles:
        _zero_rows(d_q_ptr, first, length, PADDING_PROGRAMS * BLOCK, d_stride, heads * D, D, BLOCK)
        return
    if (first > 0) | (length == 0) | (length > BLOCK):  # a tile of a longer sequence, or unused
        return
    q_ptr = qkv_ptr + start * qkv_stride + head * D
    q = load_block(q_ptr, 0, rows, length, qkv_stride, D)
    k = load_block(q_ptr + heads * D, 0, rows, length, qkv_stride, D)
    v = load_block(q_ptr + 2 * heads * D, 0, rows, length, qkv_stride, D)
    d_o = load_block(d_o_ptr + start * o_stride + head * D, 0, rows, length, o_stride, D)
    statistics = head.to(tl.int64) * capacity + start + rows
    lse = tl.load(lse_ptr + statistics, mask=rows < length, other=float("inf"))
    p = _probabilities(q, k, lse, 0, 0, length, scale, window, True, CAUSAL, WINDOW, PRECISION)
    rng, c = attention_dropout(seed_ptr, sequence_id_ptr + sequence, counter_word | head, threshold)
    p = _negate_dropped(p, 0, 0, rng, DROPOUT)
    d_v = tl.dot(tl.maximum(p, 0.0).to(d_o.dtype), d_o, input_precision=PRECISION)
    store_block(d_q_ptr + 2 * heads * D, 0, rows, length, d_stride, d_v * c, D)
    o = load_block(o_ptr + start * o_stride + head * D, 0, rows, length, o_stride, D)
    delta = tl.sum(d_o.to(tl.float32) * o.to(tl.float32), 1) / c
    d_p = tl.dot(v, tl.trans(d_o), input_precision=PRECISION)
    d_s = _score_gradients(p, d_p, delta).to(q.dtype)
    d_k = tl.dot(d_s, q, input_precision=PRECISION)
    store_block(d_q_ptr + heads * D, 0, rows, length, d_stride, d_k * (scale * c), D)
    d_q = tl.dot(tl.trans(d_s), k, input_precision=PRECISION)
    store_block(d_q_ptr, 0, rows, length, d_stride, d_q * (scale * c), D)


@operation
def attention_backward(
    d_o, qkv, o, lse, cu_seqlens, sequence_ids, tile_table, max_seqlen_bound, scale, causal, window, seed,
    counter_word, threshold, *, out,
):  # fmt: skip
    """Write d_qkv [T, 3, A, D]; arguments as in `attention_forward`."""
    d_qkv = out
    qkv, d_o = dense_tokens(qkv), d_o.contiguous()
    capacity, _, heads, _ = qkv.shape
    tiles, dropout = len(tile_table) - 1, seed is not None
    table = (tile_table, sequence_ids, seed)
    sizes = (tiles, capacity, heads, qkv.stride(0), scale, window_or_unlimited(window), counter_word, threshold)
    constants = constants_of(qkv, causal, window)
    short = shapes("short", qkv, max_seqlen_bound, dropout)
    attention_backward_short_kernel[((tiles + PADDING_PROGRAMS) * heads,)](
        qkv, o, d_o, lse, *table, d_qkv, *sizes, **constants, PADDING_PROGRAMS=PADDING_PROGRAMS, **short
    )
    if max_seqlen_bound > short["BLOCK"]:
        delta = torch.empty_like(lse)
        shape = shapes("d_q", qkv, max_seqlen_bound, dropout)
        blocks = blocks_per_tile(shape["BLOCK_M"], max_seqlen_bound)
        attention_d_q_kernel[(tiles * blocks * heads,)](
            qkv, o, d_o, lse, *table, delta, d_qkv, *sizes, short["BLOCK"] + 1, **constants, BLOCKS=blocks, **shape
        )
        shape = shapes("d_kv", qkv, max_seqlen_bound, dropout)
        blocks = blocks_per_tile(shape["BLOCK_N"], max_seqlen_bound)
        attention_d_kv_kernel[(tiles * blocks * heads,)](
            qkv, d_o, lse, delta, *table, d_qkv, *sizes, short["BLOCK"] + 1, **constants, BLOCKS=blocks, **shape
        )
