"""o = dropout(softmax(q kᵀ · scale)) v within each sequence of a packed batch, and what its two passes share.

Online softmax in base 2 (Milakov and Gimelshein, 2018; Dao, 2023): the scores' log-sum-exp is kept, from which the
backward pass (`attention_backward.py`) makes the probabilities again. Nothing T x T exists.

T tokens, S sequences, A heads, D head dimension. Places beyond cu_seqlens[-1] are inert: zero, like their gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertfast.kernels import results
from bertfast.kernels.attention_shapes import shapes
from bertfast.kernels.dropout import keep_attention, scale_of
from bertfast.kernels.operation import operation

LOG2_E = tl.constexpr(1.4426950408889634)
_SEARCHED = tl.constexpr(1024)  # sequences that a program looks through at a time
_WIDEST_STRIDE = 1 << 24  # elements between tokens: offsets within a tile stay below 2**31
_EVERYWHERE = 1 << 30  # a window that hides nothing


@triton.jit
def find_tile(cu_ptr, sequences, tokens, slot, BLOCK: tl.constexpr):
    """What the tile number `slot` is: (sequence, its first token, its length, the tile's first row in it).

    Sequence s has the slots from cu[s] // BLOCK + s on, at least as many as tiles: no list of tiles is needed. The
    number `sequences` stands for the inert places.
    """
    found = 0
    for first in range(0, sequences + 1, _SEARCHED):
        s = first + tl.arange(0, _SEARCHED)
        start = tl.load(cu_ptr + s, mask=s <= sequences, other=0)
        found += tl.sum(((s <= sequences) & (start // BLOCK + s <= slot)).to(tl.int32), 0)
    sequence = found - 1
    start = tl.load(cu_ptr + sequence)
    end = tl.load(cu_ptr + sequence + 1, mask=sequence < sequences, other=tokens)
    return sequence, start.to(tl.int64), end - start, (slot - start // BLOCK - sequence) * BLOCK


@triton.jit
def load_tile(pointer, first, rows, length, stride, D: tl.constexpr, MASKED: tl.constexpr = True):
    """[rows, D] from row `first` on; zero from `length` on, where something else lies, NaN perhaps."""
    pointers = pointer + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + tl.arange(0, D)[None, :]
    if MASKED:
        return tl.load(pointers, mask=(first + rows < length)[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(pointer, first, rows, length, stride, x, D: tl.constexpr):
    """Write [rows, D] from row `first` on, up to `length`, in the pointer's dtype."""
    pointers = pointer + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(pointers, x.to(pointer.dtype.element_ty), mask=(first + rows < length)[:, None])


@triton.jit
def visible(query, key, length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether a query of the sequence sees a key; one is a column and the other a row, either way round."""
    seen = key < length
    if CAUSAL:
        seen &= key <= query
    if WINDOW:
        seen &= (query - key <= window) & (key - query <= window)
    return seen


@triton.jit
def keys_of(
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
    sequence, start, length, first = find_tile(cu_ptr, sequences, tokens, tl.program_id(0) // heads, BLOCK_M)
    if first >= length:
        return
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    o = tl.zeros([BLOCK_M, D], tl.float32)
    o_stride = heads * D
    o_ptr += start * o_stride + head * D
    if sequence == sequences:
        store_tile(o_ptr, first, rows, length, o_stride, o, D)
        return
    q_ptr = qkv_ptr + start * qkv_stride + head * D
    k_ptr = q_ptr + heads * D
    v_ptr = k_ptr + heads * D
    q = load_tile(q_ptr, first, rows, length, qkv_stride, D)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if DROPOUT:
        seed, number = tl.load(seed_ptr), tl.load(number_ptr + sequence)
    bounds = keys_of(first, length, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    for part in tl.static_range(CAUSAL or WINDOW, 2):
        for key in tl.range(bounds[part], bounds[part + 1], BLOCK_N):
            k = load_tile(k_ptr, key, columns, length, qkv_stride, D, part)
            v = load_tile(v_ptr, key, columns, length, qkv_stride, D, part)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
            if part:
                seen = visible((first + rows)[:, None], (key + columns)[None, :], length, window, CAUSAL, WINDOW)
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
    store_tile(o_ptr, first, rows, length, o_stride, o * factor[:, None], D)
    lse_ptr += head.to(tl.int64) * tokens + start + first
    tl.store(lse_ptr + rows, highest + tl.math.log2(total), mask=first + rows < length)


@operation
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
    o, lse = results.attention_forward(qkv)
    qkv = in_tokens(qkv)
    tokens, _, heads, _ = qkv.shape
    sequences = len(cu_seqlens) - 1
    shape = shapes("forward", qkv, longest)
    attention_forward_kernel[(slots(tokens, sequences, shape["BLOCK_M"]) * heads,)](
        qkv, cu_seqlens, numbers, seed, o, lse, sequences, tokens, heads, qkv.stride(0), scale * LOG2_E.value,
        window_or_all(window), word, threshold, **constants_of(qkv, causal, window), **shape,
    )  # fmt: skip
    return o, lse


def in_tokens(qkv: Tensor) -> Tensor:
    # Any distance between tokens, none within one.
    dense = qkv.stride()[1:] == (qkv.shape[2] * qkv.shape[3], qkv.shape[3], 1)
    return qkv if dense and qkv.stride(0) < _WIDEST_STRIDE else qkv.contiguous()


def slots(tokens: int, sequences: int, block: int) -> int:
    # See `find_tile`; the inert places are one more.
    return tokens // block + sequences + 1


def window_or_all(window: int | None) -> int:
    return _EVERYWHERE if window is None else min(window, _EVERYWHERE)


def constants_of(qkv: Tensor, causal: bool, window: int | None) -> dict:
    # Three products of TF32 parts are as good as one of fp32, and run on the matrix unit.
    return {
        "D": qkv.shape[3],
        "CAUSAL": causal,
        "WINDOW": window is not None,
        "PRECISION": "tf32x3" if qkv.dtype == torch.float32 else None,
    }
