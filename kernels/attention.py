"""o = dropout(softmax(q kᵀ · scale)) v within each sequence of a packed batch, and helpers of both passes.

Online softmax in base 2 (Milakov and Gimelshein, 2018; Dao, 2023). Only the scores' log-sum-exp is kept, from which the
backward pass (`attention_backward.py`) recomputes the probabilities; no T x T tensor exists.

On Hopper, ptxas serialises every wgmma (warnings C7510 to C7515) if an accumulator is carried from one loop to another,
so a kernel has one loop over full blocks of keys and an `if` for the last, masked block.

T slots, S sequences, A heads, D head dimension. Slots beyond cu_seqlens[-1] are padding: zero, like their gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertfast.kernels.attention_shapes import shapes
from bertfast.kernels.attention_tiles import TILE
from bertfast.kernels.device import ceil_div
from bertfast.kernels.dropout import keep_attention, scale_of
from bertfast.kernels.jit import kernel
from bertfast.kernels.operation import operation

LOG2_E = tl.constexpr(1.4426950408889634)
PADDING_PROGRAMS = 32  # per head, which zero the padding slots
_MAX_TOKEN_STRIDE = 1 << 24  # elements from one token to the next: offsets within a block stay below 2**31
_UNLIMITED = 1 << 30  # a window that masks nothing


@triton.jit
def find_block(tile_ptr, tiles, slot, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Return block `slot`: (sequence, its first token, its length, the block's first row in the sequence).

    `tile_ptr` points to a table of `attention_tiles.tile_table`, whose tiles are BLOCKS blocks of BLOCK rows. Blocks
    after those of the last tile belong to the padding slots.
    """
    entry_ptr = tile_ptr + 4 * tl.minimum(slot // BLOCKS, tiles)
    sequence, start = tl.load(entry_ptr), tl.load(entry_ptr + 1)
    length, first = tl.load(entry_ptr + 2), tl.load(entry_ptr + 3)
    if slot < tiles * BLOCKS:
        first += slot % BLOCKS * BLOCK
    else:
        first += (slot - tiles * BLOCKS) * BLOCK
    return sequence, start.to(tl.int64), length, first


@triton.jit
def load_block(pointer, first, rows, length, stride, D: tl.constexpr, MASKED: tl.constexpr = True):
    """Load [rows, D] from row `first` on; rows from `length` on, of other sequences and possibly NaN, become zero."""
    pointers = pointer + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + tl.arange(0, D)[None, :]
    if MASKED:
        return tl.load(pointers, mask=(first + rows < length)[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_block(pointer, first, rows, length, stride, x, D: tl.constexpr):
    """Store [rows, D] from row `first` on, up to `length`, in the pointer's dtype."""
    pointers = pointer + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(pointers, x.to(pointer.dtype.element_ty), mask=(first + rows < length)[:, None])


@triton.jit
def attention_mask(query, key, length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Return the mask of queries that attend to keys of their sequence; one is a column and the other a row."""
    mask = key < length
    if CAUSAL:
        mask &= key <= query
    if WINDOW:
        mask &= tl.abs(query - key) <= window
    return mask


@triton.jit
def kv_range(
    first, length, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):
    """Return (begin, end) of the keys that a block of queries attends to."""
    begin, end = 0, length
    if WINDOW:
        begin = tl.maximum(first - window, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(first + BLOCK_M + window, length)
    if CAUSAL:
        end = tl.minimum(first + BLOCK_M, end)
    return begin, end


@triton.jit
def _attend(
    state,  # (o [M, D], m_i [M], l_i [M]): output, row maximum and row sum so far
    q,  # [M, D]
    k_ptr,
    v_ptr,
    key,  # first key of the block
    first,  # first query
    length,
    qkv_stride,
    scale2,
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
    """Return the state after one more block of keys."""
    o, m_i, l_i = state
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    k = load_block(k_ptr, key, columns, length, qkv_stride, D, MASKED)
    v = load_block(v_ptr, key, columns, length, qkv_stride, D, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
    if MASKED:
        mask = attention_mask((first + rows)[:, None], (key + columns)[None, :], length, window, CAUSAL, WINDOW)
        s = tl.where(mask, s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1))
    if CAUSAL or WINDOW:
        m_new = tl.where(m_new == float("-inf"), 0.0, m_new)  # all masked so far: -inf - -inf is NaN
    p = tl.math.exp2(s - m_new[:, None])
    alpha = tl.math.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    if DROPOUT:
        keep = keep_attention(first, rows[:, None], key, columns[None, :], rng)
        p = tl.where(keep, p, 0.0)
    return tl.dot(p.to(v.dtype), v, o * alpha[:, None], input_precision=PRECISION), m_new, l_i


@triton.jit
def _attend_to_all(
    state,  # as in `_attend`
    q,
    k_ptr,
    v_ptr,
    first,
    length,
    qkv_stride,
    scale2,
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
    """Return the state after all keys that a block of queries attends to."""
    if CAUSAL or WINDOW or not SPLIT:
        begin, end = kv_range(first, length, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
        for key in tl.range(begin, end, BLOCK_N):
            state = _attend(
                state, q, k_ptr, v_ptr, key, first, length, qkv_stride, scale2, window, rng,
                D, BLOCK_M, BLOCK_N, True, CAUSAL, WINDOW, PRECISION, DROPOUT,
            )  # fmt: skip
    else:
        full = length // BLOCK_N * BLOCK_N
        for key in tl.range(0, full, BLOCK_N):
            state = _attend(
                state, q, k_ptr, v_ptr, key, first, length, qkv_stride, scale2, window, rng,
                D, BLOCK_M, BLOCK_N, False, CAUSAL, WINDOW, PRECISION, DROPOUT,
            )  # fmt: skip
        if full != length:
            state = _attend(
                state, q, k_ptr, v_ptr, full, first, length, qkv_stride, scale2, window, rng,
                D, BLOCK_M, BLOCK_N, True, CAUSAL, WINDOW, PRECISION, DROPOUT,
            )  # fmt: skip
    return state


@kernel
def attention_forward_kernel(
    qkv_ptr,  # [T, 3, A, D], tokens qkv_stride apart
    tile_ptr,  # int32 [tiles + 1, 4], see attention_tiles.py
    sequence_id_ptr,  # int [S]
    seed_ptr,  # int64 []; None: no dropout
    o_ptr,  # [T, A, D]
    lse_ptr,  # fp32 [A, T], log2 of the sum of 2 to the scores · log2(e)
    tiles,
    capacity,  # T
    heads,
    qkv_stride,
    scale2,  # scale · log2(e)
    window,
    counter_word,  # of dropout, without the head
    threshold,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys
    BLOCKS: tl.constexpr,  # blocks of queries in a tile
    SPLIT: tl.constexpr,  # a loop body without a mask for full blocks of keys, and one for the last block
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    PADDING_PROGRAMS: tl.constexpr,
):
    """Compute the output of a block of queries of one head; the last programs zero the padding slots."""
    DROPOUT: tl.constexpr = seed_ptr is not None
    head = tl.program_id(0) % heads  # heads fastest: neighbouring programs read neighbouring cache lines
    slot = tl.program_id(0) // heads
    sequence, start, length, first = find_block(tile_ptr, tiles, slot, BLOCK_M, BLOCKS)
    if first >= length:
        return
    rows = tl.arange(0, BLOCK_M)
    o = tl.zeros([BLOCK_M, D], tl.float32)
    o_stride = heads * D
    o_ptr += start * o_stride + head * D
    if slot >= tiles * BLOCKS:
        for row in range(first, length, PADDING_PROGRAMS * BLOCK_M):
            store_block(o_ptr, row, rows, length, o_stride, o, D)
        return
    q_ptr = qkv_ptr + start * qkv_stride + head * D
    k_ptr = q_ptr + heads * D
    v_ptr = k_ptr + heads * D
    q = load_block(q_ptr, first, rows, length, qkv_stride, D)
    rng = (0, 0, 0, 0)
    if DROPOUT:
        rng = (tl.load(seed_ptr), tl.load(sequence_id_ptr + sequence), counter_word | head, threshold)
    state = (o, tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32))
    o, m_i, l_i = _attend_to_all(
        state, q, k_ptr, v_ptr, first, length, qkv_stride, scale2, window, rng,
        D, BLOCK_M, BLOCK_N, SPLIT, CAUSAL, WINDOW, PRECISION, DROPOUT,
    )  # fmt: skip
    factor = 1.0 / l_i
    if DROPOUT:
        factor *= scale_of(threshold)
    store_block(o_ptr, first, rows, length, o_stride, o * factor[:, None], D)
    lse_ptr += head.to(tl.int64) * capacity + start + first
    tl.store(lse_ptr + rows, m_i + tl.math.log2(l_i), mask=first + rows < length)


@operation
def attention_forward(
    qkv, cu_seqlens, sequence_ids, tile_table, max_seqlen_bound, scale, causal, window, seed, counter_word,
    threshold, *, out,
):  # fmt: skip
    """Write o [T, A, D] and the log-sum-exp of the scores in base 2, fp32 [A, T].

    No sequence is longer than `max_seqlen_bound`, which selects the block shapes. `tile_table` is computed from
    `cu_seqlens`, which is not read here.
    """
    o, lse = out
    qkv = dense_tokens(qkv)
    capacity, _, heads, _ = qkv.shape
    tiles = len(tile_table) - 1
    shape = shapes("forward", qkv, max_seqlen_bound, seed is not None)
    blocks = blocks_per_tile(shape["BLOCK_M"], max_seqlen_bound)
    attention_forward_kernel[((tiles * blocks + PADDING_PROGRAMS) * heads,)](
        qkv, tile_table, sequence_ids, seed, o, lse, tiles, capacity, heads, qkv.stride(0), scale * LOG2_E.value,
        window_or_unlimited(window), counter_word, threshold,
        **constants_of(qkv, causal, window), BLOCKS=blocks, PADDING_PROGRAMS=PADDING_PROGRAMS, **shape,
    )  # fmt: skip


def dense_tokens(qkv: Tensor) -> Tensor:
    """Return qkv if each token's elements are contiguous, tokens any distance apart, else a contiguous copy."""
    dense = qkv.stride()[1:] == (qkv.shape[2] * qkv.shape[3], qkv.shape[3], 1)
    return qkv if dense and qkv.stride(0) < _MAX_TOKEN_STRIDE else qkv.contiguous()


def blocks_per_tile(block: int, max_seqlen_bound: int) -> int:
    """Return the blocks of a tile that sequences within the bound can use."""
    return ceil_div(min(TILE, max(max_seqlen_bound, 1)), block)


def window_or_unlimited(window: int | None) -> int:
    """Return the window, or one that masks nothing."""
    return _UNLIMITED if window is None else min(window, _UNLIMITED)


def constants_of(qkv: Tensor, causal: bool, window: int | None) -> dict[str, int | bool | str | None]:
    """Return the constants that all kernels have.

    fp32 matmuls are three of TF32 parts: as accurate as fp32, and on the tensor cores.
    """
    return {
        "D": qkv.shape[3],
        "CAUSAL": causal,
        "WINDOW": window is not None,
        "PRECISION": "tf32x3" if qkv.dtype == torch.float32 else None,
    }
