"""The gradients of attention: d_q, d_k and d_v of each sequence, from q, k, v, o and the scores' log-sum-exp.

With P the probabilities, K the mask of dropout, c its scale, d_p = d_o vᵀ and delta the sums of d_o · o (Dao et al.,
2022, appendix B.2): d_v = c (K P)ᵀ d_o, d_s = P (c K d_p - delta), d_q = d_s k · scale, d_k = d_sᵀ q · scale.
A short sequence is one program a head, five products from what it holds; a longer one takes two kernels, one over
queries and one over keys. Nothing is added atomically. T, S, A and D as in `attention.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertfast.kernels import results
from bertfast.kernels.attention import (
    LOG2_E,
    constants_of,
    find_tile,
    in_tokens,
    keys_of,
    load_tile,
    slots,
    store_tile,
    visible,
    window_or_all,
)
from bertfast.kernels.attention_shapes import shapes
from bertfast.kernels.dropout import keep_attention, scale_of
from bertfast.kernels.operation import operation

_INERT_PROGRAMS = 32  # a head, that zero the gradient of inert places


@triton.jit
def _queries_of(
    first,
    length,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The queries for a block of keys, from [0] to [1]."""
    begin, end = 0, length
    if WINDOW:
        begin = tl.maximum(first - window, 0)
        end = tl.minimum(first + BLOCK_N + window, length)
    if CAUSAL:
        begin = first
    return begin // BLOCK_M * BLOCK_M, end


@triton.jit
def attention_d_q_kernel(
    qkv_ptr,  # as in the forward kernel
    o_ptr,
    d_o_ptr,  # [T, A, D]
    lse_ptr,
    cu_ptr,
    number_ptr,
    seed_ptr,
    delta_ptr,  # fp32 [A, T], written for the next kernel: sum of d_o · o, over the scale of dropout
    d_qkv_ptr,  # [T, 3, A, D], of which this writes d_q
    sequences,
    tokens,
    heads,
    qkv_stride,
    scale,
    window,
    word,
    threshold,
    shortest,  # shorter sequences are another kernel's
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # d_s is made without the factor c, which comes last.
    DROPOUT: tl.constexpr = seed_ptr is not None
    head = tl.program_id(0) % heads
    sequence, start, length, first = find_tile(cu_ptr, sequences, tokens, tl.program_id(0) // heads, BLOCK_M)
    if (first >= length) | (length < shortest) | (sequence == sequences):
        return
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    o_stride = heads * D
    d_stride = 3 * o_stride
    q_ptr = qkv_ptr + start * qkv_stride + head * D
    k_ptr = q_ptr + heads * D
    v_ptr = k_ptr + heads * D
    q = load_tile(q_ptr, first, rows, length, qkv_stride, D)
    d_o = load_tile(d_o_ptr + start * o_stride + head * D, first, rows, length, o_stride, D)
    o = load_tile(o_ptr + start * o_stride + head * D, first, rows, length, o_stride, D)
    c = 1.0
    if DROPOUT:
        seed, number = tl.load(seed_ptr), tl.load(number_ptr + sequence)
        c = scale_of(threshold)
    inside = first + rows < length
    statistics = head.to(tl.int64) * tokens + start + first + rows
    lse = tl.load(lse_ptr + statistics, mask=inside, other=float("inf"))
    delta = tl.sum(d_o.to(tl.float32) * o.to(tl.float32), 1) / c
    tl.store(delta_ptr + statistics, delta, mask=inside)
    d_q = tl.zeros([BLOCK_M, D], tl.float32)
    bounds = keys_of(first, length, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    for part in tl.static_range(CAUSAL or WINDOW, 2):
        for key in tl.range(bounds[part], bounds[part + 1], BLOCK_N):
            k = load_tile(k_ptr, key, columns, length, qkv_stride, D, part)
            v = load_tile(v_ptr, key, columns, length, qkv_stride, D, part)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
            p = tl.math.exp2(s - lse[:, None])
            if part:  # what is not seen may be infinite here
                seen = visible((first + rows)[:, None], (key + columns)[None, :], length, window, CAUSAL, WINDOW)
                p = tl.where(seen, p, 0.0)
            d_p = tl.dot(d_o, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                keep = keep_attention(first, rows[:, None], key, columns[None, :], number, word | head, seed, threshold)
                d_p = tl.where(keep, d_p, 0.0)
            d_s = p * (d_p - delta[:, None])
            d_q = tl.dot(d_s.to(k.dtype), k, d_q, input_precision=PRECISION)
    store_tile(d_qkv_ptr + start * d_stride + head * D, first, rows, length, d_stride, d_q * (scale * c), D)


@triton.jit
def attention_d_kv_kernel(
    qkv_ptr,  # as in the kernels before
    d_o_ptr,
    lse_ptr,
    delta_ptr,
    cu_ptr,
    number_ptr,
    seed_ptr,
    d_qkv_ptr,  # of which this writes d_k and d_v
    sequences,
    tokens,
    heads,
    qkv_stride,
    scale,
    window,
    word,
    threshold,
    shortest,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Tiles are keys by queries, so that they are the left operands of d_k and d_v as they are.
    DROPOUT: tl.constexpr = seed_ptr is not None
    head = tl.program_id(0) % heads
    sequence, start, length, first = find_tile(cu_ptr, sequences, tokens, tl.program_id(0) // heads, BLOCK_N)
    if (first >= length) | (length < shortest) | (sequence == sequences):
        return
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    o_stride = heads * D
    d_stride = 3 * o_stride
    q_ptr = qkv_ptr + start * qkv_stride + head * D
    k = load_tile(q_ptr + heads * D, first, rows, length, qkv_stride, D)
    v = load_tile(q_ptr + 2 * heads * D, first, rows, length, qkv_stride, D)
    d_o_ptr += start * o_stride + head * D
    c = 1.0
    if DROPOUT:
        seed, number = tl.load(seed_ptr), tl.load(number_ptr + sequence)
        c = scale_of(threshold)
    d_k = tl.zeros([BLOCK_N, D], tl.float32)
    d_v = tl.zeros([BLOCK_N, D], tl.float32)
    begin, end = _queries_of(first, length, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    for query in tl.range(begin, end, BLOCK_M):
        q = load_tile(q_ptr, query, columns, length, qkv_stride, D)
        d_o = load_tile(d_o_ptr, query, columns, length, o_stride, D)
        inside = query + columns < length
        statistics = head.to(tl.int64) * tokens + start + query + columns
        lse = tl.load(lse_ptr + statistics, mask=inside, other=float("inf"))  # so that p is 0 beyond the end
        delta = tl.load(delta_ptr + statistics, mask=inside, other=0.0)
        p = tl.math.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E) - lse[None, :])
        if CAUSAL or WINDOW:
            seen = visible((query + columns)[None, :], (first + rows)[:, None], length, window, CAUSAL, WINDOW)
            p = tl.where(seen, p, 0.0)
        if DROPOUT:
            keep = keep_attention(query, columns[None, :], first, rows[:, None], number, word | head, seed, threshold)
            p = tl.where(keep, p, -p)  # what is dropped is negative from here on, which costs no register
        d_v = tl.dot(tl.maximum(p, 0.0).to(d_o.dtype), d_o, d_v, input_precision=PRECISION)
        d_p = tl.dot(v, tl.trans(d_o), input_precision=PRECISION)
        d_s = tl.abs(p) * (tl.where(p > 0, d_p, 0.0) - delta[None, :])
        d_k = tl.dot(d_s.to(q.dtype), q, d_k, input_precision=PRECISION)
    d_k_ptr = d_qkv_ptr + start * d_stride + (heads + head) * D
    store_tile(d_k_ptr, first, rows, length, d_stride, d_k * (scale * c), D)
    store_tile(d_k_ptr + heads * D, first, rows, length, d_stride, d_v * c, D)


@triton.jit
def attention_backward_short_kernel(
    qkv_ptr,  # as in the kernels before
    o_ptr,
    d_o_ptr,
    lse_ptr,
    cu_ptr,
    number_ptr,
    seed_ptr,
    d_qkv_ptr,  # all of it for sequences of at most BLOCK tokens, and the inert places
    sequences,
    tokens,
    heads,
    qkv_stride,
    scale,
    window,
    word,
    threshold,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    INERT_PROGRAMS: tl.constexpr,
):
    DROPOUT: tl.constexpr = seed_ptr is not None
    head = tl.program_id(0) % heads
    sequence = tl.program_id(0) // heads
    rows = tl.arange(0, BLOCK)
    o_stride = heads * D
    d_stride = 3 * o_stride
    d_q_ptr = d_qkv_ptr + head * D
    if sequence >= sequences:
        used = tl.load(cu_ptr + sequences)
        zero = tl.zeros([BLOCK, D], tl.float32)
        for first in range(used + (sequence - sequences) * BLOCK, tokens, INERT_PROGRAMS * BLOCK):
            for part in tl.static_range(3):
                store_tile(d_q_ptr + part * heads * D, first, rows, tokens, d_stride, zero, D)
        return
    start = tl.load(cu_ptr + sequence).to(tl.int64)
    length = tl.load(cu_ptr + sequence + 1) - start.to(tl.int32)
    if (length == 0) | (length > BLOCK):
        return
    q_ptr = qkv_ptr + start * qkv_stride + head * D
    q = load_tile(q_ptr, 0, rows, length, qkv_stride, D)
    k = load_tile(q_ptr + heads * D, 0, rows, length, qkv_stride, D)
    v = load_tile(q_ptr + 2 * heads * D, 0, rows, length, qkv_stride, D)
    d_o = load_tile(d_o_ptr + start * o_stride + head * D, 0, rows, length, o_stride, D)
    statistics = head.to(tl.int64) * tokens + start + rows
    lse = tl.load(lse_ptr + statistics, mask=rows < length, other=float("inf"))
    p = tl.math.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E) - lse[None, :])
    p = tl.where(visible(rows[None, :], rows[:, None], length, window, CAUSAL, WINDOW), p, 0.0)
    c = 1.0
    if DROPOUT:
        seed, number = tl.load(seed_ptr), tl.load(number_ptr + sequence)
        keep = keep_attention(0, rows[None, :], 0, rows[:, None], number, word | head, seed, threshold)
        p = tl.where(keep, p, -p)  # as above
        c = scale_of(threshold)
    d_q_ptr += start * d_stride
    d_v = tl.dot(tl.maximum(p, 0.0).to(d_o.dtype), d_o, input_precision=PRECISION)
    store_tile(d_q_ptr + 2 * heads * D, 0, rows, length, d_stride, d_v * c, D)
    o = load_tile(o_ptr + start * o_stride + head * D, 0, rows, length, o_stride, D)
    delta = tl.sum(d_o.to(tl.float32) * o.to(tl.float32), 1) / c
    d_p = tl.dot(v, tl.trans(d_o), input_precision=PRECISION)
    d_s = (tl.abs(p) * (tl.where(p > 0, d_p, 0.0) - delta[None, :])).to(q.dtype)
    d_k = tl.dot(d_s, q, input_precision=PRECISION)
    store_tile(d_q_ptr + heads * D, 0, rows, length, d_stride, d_k * (scale * c), D)
    d_q = tl.dot(tl.trans(d_s), k, input_precision=PRECISION)
    store_tile(d_q_ptr, 0, rows, length, d_stride, d_q * (scale * c), D)


@operation
def attention_backward(
    d_o: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    numbers: Tensor,
    longest: int,
    scale: float,
    causal: bool,
    window: int | None,
    seed: Tensor | None,
    word: int,
    threshold: int,
) -> Tensor:
    """d_qkv [T, 3, A, D]."""
    d_qkv = results.attention_backward(d_o, qkv)
    qkv, d_o = in_tokens(qkv), d_o.contiguous()
    tokens, _, heads, _ = qkv.shape
    sequences = len(cu_seqlens) - 1
    sizes = (sequences, tokens, heads, qkv.stride(0), scale, window_or_all(window), word, threshold)
    constants = constants_of(qkv, causal, window)
    short = shapes("short", qkv, longest)
    attention_backward_short_kernel[((sequences + _INERT_PROGRAMS) * heads,)](
        qkv, o, d_o, lse, cu_seqlens, numbers, seed, d_qkv, *sizes, **constants, INERT_PROGRAMS=_INERT_PROGRAMS, **short
    )
    if longest > short["BLOCK"]:
        delta = torch.empty_like(lse)
        shape = shapes("d_q", qkv, longest)
        attention_d_q_kernel[(slots(tokens, sequences, shape["BLOCK_M"]) * heads,)](
            qkv, o, d_o, lse, cu_seqlens, numbers, seed, delta, d_qkv, *sizes, short["BLOCK"] + 1, **constants, **shape
        )
        shape = shapes("d_kv", qkv, longest)
        attention_d_kv_kernel[(slots(tokens, sequences, shape["BLOCK_N"]) * heads,)](
            qkv, d_o, lse, delta, cu_seqlens, numbers, seed, d_qkv, *sizes, short["BLOCK"] + 1, **constants, **shape
        )
    return d_qkv
