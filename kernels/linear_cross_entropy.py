"""Cross entropy of hidden W^T + bias over the rows that have a label, and its gradients, in chunks of logits.

Between the library's GEMMs one kernel computes the loss of a chunk of logits and one replaces them by their gradient. A
chunk's logits take at most 256 MiB, or 1,024 rows if these take more: the full logits are never materialised.

R rows, C columns of logits: the vocabulary, then padding columns with bias -inf and logits 0, so that kernels need no
bound at the end of the vocabulary; see logits_in_chunks.py.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bertfast.kernels.device import ceil_div
from bertfast.kernels.jit import kernel
from bertfast.kernels.logits_in_chunks import (
    equal_chunk,
    gradients_in_chunks,
    linear_cross_entropy,
    max_rows_on_gpu,
    padded_columns,
)
from bertfast.kernels.operation import operation
from bertfast.kernels.rows import summing_programs
from bertfast.kernels.sum_by_index import sum_by_index

_ROWS, _BLOCK = 32, 64  # rows and columns of a tile; C is a multiple of these columns, so they need no mask
_NO_COLUMN = tl.constexpr(1 << 30)  # larger than any column
_WARPS = 4
_LANES = 512  # per row: four accesses of 16 bytes for each thread of _WARPS warps


@kernel(specialize=("columns",))
def cross_entropy_kernel(
    logits_ptr,  # [R, C]
    bias_ptr,  # fp32 [C]
    labels_ptr,  # int64 [R], negative: ignored
    row_max_ptr,  # fp32 [R], written: the maximum logit
    scale_ptr,  # fp32 [R], written: 1 / sum of exp(logit - maximum); 0 for ignored rows
    losses_ptr,  # fp32 [R], written
    correct_ptr,  # bool [R], written: whether the label is the first argmax
    columns,  # C
    vocab_size,  # V
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute the loss of one row of logits, and what `cross_entropy_gradient_kernel` needs of it."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * columns
    label = tl.minimum(tl.maximum(tl.load(labels_ptr + row), -1), columns).to(tl.int32)
    in_vocab = label < vocab_size  # a label outside of the vocabulary makes the loss NaN
    target = tl.load(logits_ptr + tl.maximum(label, 0), mask=in_vocab, other=float("nan")).to(tl.float32)
    target += tl.load(bias_ptr + tl.maximum(label, 0), mask=in_vocab, other=0.0)
    # Online softmax with a maximum and sum per lane, reduced over lanes at the end. The maximum starts from a logit,
    # since -inf - -inf is NaN.
    lane = tl.arange(0, LANES) * WIDTH
    within = tl.arange(0, WIDTH)
    m_i = tl.zeros([LANES], tl.float32) + target
    l_i = tl.zeros([LANES], tl.float32)
    first = tl.full([LANES], _NO_COLUMN, tl.int32)  # start of the lane's first WIDTH columns that reach the target
    for start in range(0, columns, LANES * WIDTH):
        logits = _load(logits_ptr, bias_ptr, start + lane[:, None] + within[None, :], columns)
        block_max = tl.max(logits, 1)
        m_new = tl.maximum(m_i, block_max)
        l_i = l_i * _exp(m_i - m_new) + tl.sum(_exp(logits - m_new[:, None]), 1)
        m_i = m_new
        first = tl.minimum(first, tl.where(block_max >= target, start + lane, _NO_COLUMN))
    counted = label >= 0
    row_max = tl.max(m_i, 0)
    l_i = tl.sum(l_i * _exp(m_i - row_max), 0)
    # argmax is the first of equal logits, so the label must be the first column that reaches the target.
    column = tl.min(first, 0) + within
    predicted = tl.min(tl.where(_load(logits_ptr, bias_ptr, column, columns) >= target, column, _NO_COLUMN), 0)
    tl.store(losses_ptr + row, tl.where(counted, row_max - target + tl.log(l_i), 0.0))
    tl.store(correct_ptr + row, (predicted == label) & (row_max == target))
    tl.store(row_max_ptr + row, row_max)
    tl.store(scale_ptr + row, tl.where(counted, 1.0 / l_i, 0.0))


@triton.jit
def _load(logits_ptr, bias_ptr, column, columns):
    """Return logits plus bias in fp32, -inf out of bounds."""
    inside = column < columns
    logits = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return logits + tl.load(bias_ptr + column, mask=inside, other=-float("inf"))


@triton.jit
def _exp(x):
    """Return e^x in two instructions."""
    return tl.exp2(1.4426950408889634 * x)


@kernel(specialize=("columns",))
def cross_entropy_gradient_kernel(
    logits_ptr,  # [R, C]; becomes the gradient
    bias_ptr,  # as in the first kernel
    labels_ptr,
    row_max_ptr,
    scale_ptr,
    sums_ptr,  # fp32 [programs, C]: each program's partial sum of d_bias, accumulated
    rows,  # R
    columns,  # C
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replace BLOCK columns of logits by their gradient, and add their sums over rows to d_bias."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    bias = tl.load(bias_ptr + column)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = row < rows
        label = tl.load(labels_ptr + row, mask=inside, other=-1).to(tl.int32)
        row_max = tl.load(row_max_ptr + row, mask=inside, other=float("inf"))
        scale = tl.load(scale_ptr + row, mask=inside, other=0.0)
        pointers = logits_ptr + row.to(tl.int64) * columns + column
        logits = tl.load(pointers, mask=inside, other=0.0).to(tl.float32) + bias
        d_logits = _exp(logits - row_max) * scale - (column == label).to(tl.float32)
        tl.store(pointers, d_logits.to(logits_ptr.dtype.element_ty), mask=inside)
        sums += d_logits
    sums_ptr += tl.program_id(0).to(tl.int64) * columns + column
    tl.store(sums_ptr, tl.load(sums_ptr) + tl.sum(sums, 0, keep_dims=True))


@operation
def linear_cross_entropy_forward(hidden, rows, weight, bias, labels, needs_grad, dtype):
    """Return the results of `logits_in_chunks.linear_cross_entropy`."""
    return linear_cross_entropy(hidden, rows, weight, bias, labels, needs_grad, dtype, _in_chunks, sum_by_index)


def _in_chunks(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, needs_grad: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Return (losses fp32 [R], correct bool [R], d_x in x's memory, d_weight, d_bias); empty if not needed."""
    rows, vocab_size = len(x), len(weight)
    columns = padded_columns(vocab_size)
    chunk = equal_chunk(rows, max_rows_on_gpu(columns * x.element_size()))
    padded_bias = F.pad(bias.float(), (0, columns - vocab_size), value=-math.inf)
    losses, correct = x.new_empty(rows, dtype=torch.float32), torch.empty_like(labels, dtype=torch.bool)
    row_max, scale = torch.empty_like(losses), torch.empty_like(losses)
    tiles, blocks = ceil_div(min(chunk, rows), _ROWS), columns // _BLOCK
    programs = ceil_div(summing_programs(tiles * blocks, x.device, _WARPS), blocks)
    sums = x.new_zeros((programs, columns), dtype=torch.float32)

    def differentiate(logits: Tensor, chunk_rows: slice) -> None:
        statistics = labels[chunk_rows], row_max[chunk_rows], scale[chunk_rows]
        cross_entropy_kernel[(len(logits),)](
            logits, padded_bias, *statistics, losses[chunk_rows], correct[chunk_rows], columns, vocab_size,
            LANES=_LANES, WIDTH=16 // x.element_size(), num_warps=_WARPS,
        )  # fmt: skip
        if any(needs_grad):
            cross_entropy_gradient_kernel[(programs, blocks)](
                logits, padded_bias, *statistics, sums, len(logits), columns, ROWS=_ROWS, BLOCK=_BLOCK, num_warps=_WARPS
            )

    d_weight = gradients_in_chunks(x, weight, needs_grad, chunk, differentiate)
    d_bias = sums.sum(0)[:vocab_size] if needs_grad[2] else bias.new_empty(0)
    return losses, correct, x, d_weight, d_bias
