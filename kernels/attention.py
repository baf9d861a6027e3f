"""o = dropout(softmax(q kᵀ · scale)) v within each sequence of a packed batch, and its gradients.

Online softmax in base 2 (Milakov and Gimelshein, 2018; Dao, 2023): the forward pass keeps the scores' log-sum-exp, from
which the backward pass makes the probabilities again. Nothing T x T exists, nothing is added atomically, and dropout's
mask is drawn again wherever it is needed. The backward pass of a short sequence is one program a head, five products
from what it holds; a longer one's is two kernels, one over queries and one over keys.

T tokens, S sequences, A heads, D head dimension. Places beyond cu_seqlens[-1] are inert: zero, like their gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertfast.kernels.attention_shapes import shapes
from bertfast.kernels.dropout import keep_attention, scale_of
from bertfast.kernels.operation import operation

_LOG2_E = tl.constexpr(1.4426950408889634)
_SEARCHED = tl.constexpr(1024)  # sequences that a program looks through at a time
_INERT_PROGRAMS = 32  # a head, that zero the gradient of inert places
_WIDEST_STRIDE = 1 << 24  # elements between tokens: offsets within a tile stay below 2**31
_EVERYWHERE = 1 << 30  # a window that hides nothing


@triton.jit
def _tile(cu_ptr, sequences, tokens, slot, BLOCK: tl.constexpr):
    """What the tile number `slot` is: (sequence, its first token, its length, the tile's first row in it).

    Sequence s has the slots from cu[s] // BLOCK + s on, at least as many as tiles: no list of tiles is needed. The
    number `sequences` stands for the inert places.
    """
    found = 0
    for first in range(0, sequences + 1, _SEARCHED):
        s = first + tl.arange(0, _SEARCHED)
        start = tl.load(cu_ptr + s, mask=s <= sequences, other=2147483647)
        found += tl.sum(((s <= sequences) & (start // BLOCK + s <= slot)).to(tl.int32), 0)
    sequence = found - 1
    start = tl.load(cu_ptr + sequence)
    end = tl.load(cu_ptr + sequence + 1, mask=sequence < sequences, other=tokens)
    return sequence, start.to(tl.int64), end - start, (slot - start // BLOCK - sequence) * BLOCK


@triton.jit
def _load(pointer, first, rows, length, stride, D: tl.constexpr, MASKED: tl.constexpr = True):
    """[rows, D] from row `first` on; zero from `length` on, where something else lies, NaN perhaps."""
    pointers = pointer + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + tl.arange(0, D)[None, :]
    if MASKED:
        return tl.load(pointers, mask=(first + rows < length)[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store(pointer, first, rows, length, stride, x, D: tl.constexpr):
    """Write [rows, D] from row `first` on, up to `length`, in the pointer's dtype."""
    pointers = pointer + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(pointers, x.to(pointer.dtype.element_ty), mask=(first + rows < length)[:, None])


@triton.jit
def _visible(query, key, length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether a query of the sequence sees a key; one is a column and the other a row, either way round."""
    visible = key < length
    if CAUSAL:
        visible &= key <= query
    if WINDOW:
        visible &= (query - key <= window) & (key - query <= window)
    return visible


@triton.jit
def _keys_of(
    first,
    length,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The keys for a block of queries: those that all of it see, from [0] to [1], and those to look at, up to [2]."""
    begin, end = 0, length
    if WINDOW:
        begin = tl.maximum(first - window, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(first + BLOCK_M + window, length)
    if CAUSAL:
        end = tl.minimum(first + BLOCK_M, length)
    seen = begin
    if not (CAUSAL or WINDOW):
        seen = length // BLOCK_N * BLOCK_N
    return begin, seen, end


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
def attention_forward_kernel(
    qkv_ptr,  # [T, 3, A, D], tokens qkv_stride apart
    cu_ptr,  # int32 [S + 1]
    number_ptr,  # int [S], the sequences' numbers
    seed_ptr,  # int64 []; None: no dropout
    o_ptr,  # [T, A, D]
    lse_ptr,  # fp32 [A, T], log2 of the sum of 2 to the scores · log2(e)
    sequences,
    tokens,
    heads,
    qkv_stride,
    scale2,  # scale · log2(e)
    window,
    word,
    threshold,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    DROPOUT: tl.constexpr = seed_ptr is not None
    head = tl.program_id(0) % heads  # heads fastest: neighbours read neighbouring lines
    sequence, start, length, first = _tile(cu_ptr, sequences, tokens, tl.program_id(0) // heads, BLOCK_M)
    if first >= length:
        return
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    o = tl.zeros([BLOCK_M, D], tl.float32)
    o_stride = heads * D
    o_ptr += start * o_stride + head * D
    if sequence == sequences:
        _store(o_ptr, first, rows, length, o_stride, o, D)
        return
    q_ptr = qkv_ptr + start * qkv_stride + head * D
    k_ptr = q_ptr + heads * D
    v_ptr = k_ptr + heads * D
    q = _load(q_ptr, first, rows, length, qkv_stride, D)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if DROPOUT:
        seed, number = tl.load(seed_ptr), tl.load(number_ptr + sequence)
    bounds = _keys_of(first, length, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    for part in tl.static_range(CAUSAL or WINDOW, 2):
        for key in tl.range(bounds[part], bounds[part + 1], BLOCK_N):
            k = _load(k_ptr, key, columns, length, qkv_stride, D, part)
            v = _load(v_ptr, key, columns, length, qkv_stride, D, part)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
            if part:
                seen = _visible((first + rows)[:, None], (key + columns)[None, :], length, window, CAUSAL, WINDOW)
                s = tl.where(seen, s, float("-inf"))
            higher = tl.maximum(highest, tl.max(s, 1))
            if part:
                higher = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: -inf less -inf is NaN
            p = tl.math.exp2(s - higher[:, None])
            shrink = tl.math.exp2(highest - higher)
            total = total * shrink + tl.sum(p, 1)
            if DROPOUT:
                keep = keep_attention(first, rows[:, None], key, columns[None, :], number, word | head, seed, threshold)
                p = tl.where(keep, p, 0.0)
            o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)
            highest = higher
    factor = 1.0 / total
    if DROPOUT:
        factor *= scale_of(threshold)
    _store(o_ptr, first, rows, length, o_stride, o * factor[:, None], D)
    lse_ptr += head.to(tl.int64) * tokens + start + first
    tl.store(lse_ptr + rows, highest + tl.math.log2(total), mask=first + rows < length)


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
    # With keep 0 or 1 and c the scale of dropout, d_s = p · (c · keep · d_p - sum(d_o · o)): c comes last.
    DROPOUT: tl.constexpr = seed_ptr is not None
    head = tl.program_id(0) % heads
    sequence, start, length, first = _tile(cu_ptr, sequences, tokens, tl.program_id(0) // heads, BLOCK_M)
    if (first >= length) | (length < shortest) | (sequence == sequences):
        return
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    o_stride = heads * D
    d_stride = 3 * o_stride
    q_ptr = qkv_ptr + start * qkv_stride + head * D
    k_ptr = q_ptr + heads * D
    v_ptr = k_ptr + heads * D
    q = _load(q_ptr, first, rows, length, qkv_stride, D)
    d_o = _load(d_o_ptr + start * o_stride + head * D, first, rows, length, o_stride, D)
    o = _load(o_ptr + start * o_stride + head * D, first, rows, length, o_stride, D)
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
    bounds = _keys_of(first, length, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    for part in tl.static_range(CAUSAL or WINDOW, 2):
        for key in tl.range(bounds[part], bounds[part + 1], BLOCK_N):
            k = _load(k_ptr, key, columns, length, qkv_stride, D, part)
            v = _load(v_ptr, key, columns, length, qkv_stride, D, part)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2_E)
            p = tl.math.exp2(s - lse[:, None])
            if part:  # what is not seen may be infinite here
                seen = _visible((first + rows)[:, None], (key + columns)[None, :], length, window, CAUSAL, WINDOW)
                p = tl.where(seen, p, 0.0)
            d_p = tl.dot(d_o, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                keep = keep_attention(first, rows[:, None], key, columns[None, :], number, word | head, seed, threshold)
                d_p = tl.where(keep, d_p, 0.0)
            d_s = p * (d_p - delta[:, None])
            d_q = tl.dot(d_s.to(k.dtype), k, d_q, input_precision=PRECISION)
    _store(d_qkv_ptr + start * d_stride + head * D, first, rows, length, d_stride, d_q * (scale * c), D)


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
    sequence, start, length, first = _tile(cu_ptr, sequences, tokens, tl.program_id(0) // heads, BLOCK_N)
    if (first >= length) | (length < shortest) | (sequence == sequences):
        return
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    o_stride = heads * D
    d_stride = 3 * o_stride
    q_ptr = qkv_ptr + start * qkv_stride + head * D
    k = _load(q_ptr + heads * D, first, rows, length, qkv_stride, D)
    v = _load(q_ptr + 2 * heads * D, first, rows, length, qkv_stride, D)
    d_o_ptr += start * o_stride + head * D
    c = 1.0
    if DROPOUT:
        seed, number = tl.load(seed_ptr), tl.load(number_ptr + sequence)
        c = scale_of(threshold)
    d_k = tl.zeros([BLOCK_N, D], tl.float32)
    d_v = tl.zeros([BLOCK_N, D], tl.float32)
    begin, end = _queries_of(first, length, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    for query in tl.range(begin, end, BLOCK_M):
        q = _load(q_ptr, query, columns, length, qkv_stride, D)
        d_o = _load(d_o_ptr, query, columns, length, o_stride, D)
        inside = query + columns < length
        statistics = head.to(tl.int64) * tokens + start + query + columns
        lse = tl.load(lse_ptr + statistics, mask=inside, other=float("inf"))  # so that p is 0 beyond the end
        delta = tl.load(delta_ptr + statistics, mask=inside, other=0.0)
        p = tl.math.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * _LOG2_E) - lse[None, :])
        if CAUSAL or WINDOW:
            seen = _visible((query + columns)[None, :], (first + rows)[:, None], length, window, CAUSAL, WINDOW)
            p = tl.where(seen, p, 0.0)
        if DROPOUT:
            keep = keep_attention(query, columns[None, :], first, rows[:, None], number, word | head, seed, threshold)
            p = tl.where(keep, p, -p)  # what is dropped is negative from here on, which costs no register
        d_v = tl.dot(tl.maximum(p, 0.0).to(d_o.dtype), d_o, d_v, input_precision=PRECISION)
        d_p = tl.dot(v, tl.trans(d_o), input_precision=PRECISION)
        d_s = tl.abs(p) * (tl.where(p > 0, d_p, 0.0) - delta[None, :])
        d_k = tl.dot(d_s.to(q.dtype), q, d_k, input_precision=PRECISION)
    d_k_ptr = d_qkv_ptr + start * d_stride + (heads + head) * D
    _store(d_k_ptr, first, rows, length, d_stride, d_k * (scale * c), D)
    _store(d_k_ptr + heads * D, first, rows, length, d_stride, d_v * c, D)


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
                _store(d_q_ptr + part * heads * D, first, rows, tokens, d_stride, zero, D)
        return
    start = tl.load(cu_ptr + sequence).to(tl.int64)
    length = tl.load(cu_ptr + sequence + 1) - start.to(tl.int32)
    if (length == 0) | (length > BLOCK):
        return
    q_ptr = qkv_ptr + start * qkv_stride + head * D
    q = _load(q_ptr, 0, rows, length, qkv_stride, D)
    k = _load(q_ptr + heads * D, 0, rows, length, qkv_stride, D)
    v = _load(q_ptr + 2 * heads * D, 0, rows, length, qkv_stride, D)
    d_o = _load(d_o_ptr + start * o_stride + head * D, 0, rows, length, o_stride, D)
    statistics = head.to(tl.int64) * tokens + start + rows
    lse = tl.load(lse_ptr + statistics, mask=rows < length, other=float("inf"))
    p = tl.math.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * _LOG2_E) - lse[None, :])
    p = tl.where(_visible(rows[None, :], rows[:, None], length, window, CAUSAL, WINDOW), p, 0.0)
    c = 1.0
    if DROPOUT:
        seed, number = tl.load(seed_ptr), tl.load(number_ptr + sequence)
        keep = keep_attention(0, rows[None, :], 0, rows[:, None], number, word | head, seed, threshold)
        p = tl.where(keep, p, -p)  # as above
        c = scale_of(threshold)
    d_q_ptr += start * d_stride
    d_v = tl.dot(tl.maximum(p, 0.0).to(d_o.dtype), d_o, input_precision=PRECISION)
    _store(d_q_ptr + 2 * heads * D, 0, rows, length, d_stride, d_v * c, D)
    o = _load(o_ptr + start * o_stride + head * D, 0, rows, length, o_stride, D)
    delta = tl.sum(d_o.to(tl.float32) * o.to(tl.float32), 1) / c
    d_p = tl.dot(v, tl.trans(d_o), input_precision=PRECISION)
    d_s = (tl.abs(p) * (tl.where(p > 0, d_p, 0.0) - delta[None, :])).to(q.dtype)
    d_k = tl.dot(d_s, q, input_precision=PRECISION)
    _store(d_q_ptr + heads * D, 0, rows, length, d_stride, d_k * (scale * c), D)
    d_q = tl.dot(tl.trans(d_s), k, input_precision=PRECISION)
    _store(d_q_ptr, 0, rows, length, d_stride, d_q * (scale * c), D)


def attention_forward_fake(qkv, *_):
    tokens, _, heads, head_dimension = qkv.shape
    return qkv.new_empty((tokens, heads, head_dimension)), qkv.new_empty((heads, tokens), dtype=torch.float32)


@operation(attention_forward_fake)
def attention_forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    numbers: Tensor,
    longest: int,
    scale: float,
    causal: bool,
    window: int | None,
    seed: Tensor | None,
    word: int,
    threshold: int,
) -> tuple[Tensor, Tensor]:
    """(o [T, A, D], log-sum-exp of the scores in base 2, fp32 [A, T]); without `seed` nothing is dropped.

    No sequence is longer than `longest`, by which the tiles are chosen.
    """
    o, lse = attention_forward_fake(qkv)
    qkv = _in_tokens(qkv)
    tokens, _, heads, _ = qkv.shape
    sequences = len(cu_seqlens) - 1
    shape = shapes("forward", qkv, longest)
    attention_forward_kernel[(_slots(tokens, sequences, shape["BLOCK_M"]) * heads,)](
        qkv, cu_seqlens, numbers, seed, o, lse, sequences, tokens, heads, qkv.stride(0), scale * _LOG2_E.value,
        _window(window), word, threshold, **_constants(qkv, causal, window), **shape,
    )  # fmt: skip
    return o, lse


def attention_backward_fake(d_o, qkv, *_):
    return qkv.new_empty(qkv.shape)


@operation(attention_backward_fake)
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
    d_qkv = attention_backward_fake(d_o, qkv)
    qkv, d_o = _in_tokens(qkv), d_o.contiguous()
    tokens, _, heads, _ = qkv.shape
    sequences = len(cu_seqlens) - 1
    sizes = (sequences, tokens, heads, qkv.stride(0), scale, _window(window), word, threshold)
    constants = _constants(qkv, causal, window)
    short = shapes("short", qkv, longest)
    attention_backward_short_kernel[((sequences + _INERT_PROGRAMS) * heads,)](
        qkv, o, d_o, lse, cu_seqlens, numbers, seed, d_qkv, *sizes, **constants, INERT_PROGRAMS=_INERT_PROGRAMS, **short
    )
    if longest > short["BLOCK"]:
        delta = torch.empty_like(lse)
        shape = shapes("d_q", qkv, longest)
        attention_d_q_kernel[(_slots(tokens, sequences, shape["BLOCK_M"]) * heads,)](
            qkv, o, d_o, lse, cu_seqlens, numbers, seed, delta, d_qkv, *sizes, short["BLOCK"] + 1, **constants, **shape
        )
        shape = shapes("d_kv", qkv, longest)
        attention_d_kv_kernel[(_slots(tokens, sequences, shape["BLOCK_N"]) * heads,)](
            qkv, d_o, lse, delta, cu_seqlens, numbers, seed, d_qkv, *sizes, short["BLOCK"] + 1, **constants, **shape
        )
    return d_qkv


def _in_tokens(qkv: Tensor) -> Tensor:
    # Any distance between tokens, none within one.
    dense = qkv.stride()[1:] == (qkv.shape[2] * qkv.shape[3], qkv.shape[3], 1)
    return qkv if dense and qkv.stride(0) < _WIDEST_STRIDE else qkv.contiguous()


def _slots(tokens: int, sequences: int, block: int) -> int:
    # See `_tile`; the inert places are one more.
    return tokens // block + sequences + 1


def _window(window: int | None) -> int:
    return _EVERYWHERE if window is None else min(window, _EVERYWHERE)


def _constants(qkv: Tensor, causal: bool, window: int | None) -> dict:
    # Three products of TF32 parts are as good as one of fp32, and run on the matrix unit.
    return {
        "D": qkv.shape[3],
        "CAUSAL": causal,
        "WINDOW": window is not None,
        "PRECISION": "tf32x3" if qkv.dtype == torch.float32 else None,
    }
