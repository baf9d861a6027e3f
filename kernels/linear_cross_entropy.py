"""Cross entropy of the rows of hidden W^T + bias that have a label, its gradients beside it, in chunks of logits.

Between the library's GEMMs one kernel reads a chunk's logits for the loss and one turns them into their gradient. A
chunk's logits take at most 256 MiB, or 1,024 rows where these are more: all logits never exist at a time.

R rows, C columns of logits: the vocabulary's, and then some where the bias is -inf and the logits 0, so that no pass
need know where the vocabulary ends; see logits_in_chunks.py.
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
    linear_cross_entropy,
    most_rows_on_gpu,
    multiply_in_chunks,
    padded_columns,
)
from bertfast.kernels.operation import operation
from bertfast.kernels.rows import summing_programs
from bertfast.kernels.sum_by_index import sum_by_index

_ROWS, _BLOCK = 32, 64  # rows and columns of a tile; C is a multiple of these columns, so they need no mask
_NOWHERE = tl.constexpr(1 << 30)  # a column behind all others
_LANES = 512  # of a row: four of 16 bytes for each thread of four warps


@kernel(specialize=("columns",))
def cross_entropy_kernel(
    logits_ptr,  # [R, C]
    bias_ptr,  # fp32 [C]
    labels_ptr,  # int64 [R], negative: none
    largest_ptr,  # fp32 [R], written: the largest logit
    scale_ptr,  # fp32 [R], written: what makes exp(logit - largest) a probability; 0 where there is no label
    losses_ptr,  # fp32 [R], written
    correct_ptr,  # bool [R], written: whether the label's is the first of the largest logits
    columns,  # C
    vocab_size,  # V
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * columns
    label = tl.minimum(tl.maximum(tl.load(labels_ptr + row), -1), columns).to(tl.int32)
    known = label < vocab_size  # a label outside of the vocabulary makes the loss NaN
    target = tl.load(logits_ptr + tl.maximum(label, 0), mask=known, other=float("nan")).to(tl.float32)
    target += tl.load(bias_ptr + tl.maximum(label, 0), mask=known, other=0.0)
    # Each lane has its own maximum and sum, and the lanes meet once. They start from a logit: -inf - -inf is no number.
    lane = tl.arange(0, LANES) * WIDTH
    within = tl.arange(0, WIDTH)
    largest = tl.zeros([LANES], tl.float32) + target
    total = tl.zeros([LANES], tl.float32)
    first = tl.full([LANES], _NOWHERE, tl.int32)  # where the lane's first WIDTH columns start that reach the target
    for start in range(0, columns, LANES * WIDTH):
        logits = _load(logits_ptr, bias_ptr, start + lane[:, None] + within[None, :], columns)
        here = tl.max(logits, 1)
        larger = tl.maximum(largest, here)
        total = total * _exp(largest - larger) + tl.sum(_exp(logits - larger[:, None]), 1)
        largest = larger
        first = tl.minimum(first, tl.where(here >= target, start + lane, _NOWHERE))
    counted = label >= 0
    row_largest = tl.max(largest, 0)
    total = tl.sum(total * _exp(largest - row_largest), 0)
    # Of equal logits argmax takes the first, so the label must be the first to reach its own.
    column = tl.min(first, 0) + within
    answer = tl.min(tl.where(_load(logits_ptr, bias_ptr, column, columns) >= target, column, _NOWHERE), 0)
    tl.store(losses_ptr + row, tl.where(counted, row_largest - target + tl.log(total), 0.0))
    tl.store(correct_ptr + row, (answer == label) & (row_largest == target))
    tl.store(largest_ptr + row, row_largest)
    tl.store(scale_ptr + row, tl.where(counted, 1.0 / total, 0.0))


@triton.jit
def _load(logits_ptr, bias_ptr, column, columns):
    """Logits with their bias in fp32, -inf outside."""
    inside = column < columns
    logits = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return logits + tl.load(bias_ptr + column, mask=inside, other=-float("inf"))


@triton.jit
def _exp(x):
    """e^x in two instructions."""
    return tl.exp2(1.4426950408889634 * x)


@kernel(specialize=("columns",))
def cross_entropy_gradient_kernel(
    logits_ptr,  # [R, C]; becomes the gradient
    bias_ptr,  # as in the first kernel
    labels_ptr,
    largest_ptr,
    scale_ptr,
    sums_ptr,  # fp32 [programs, C]: each program's share of d_bias, added to
    rows,  # R
    columns,  # C
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    bias = tl.load(bias_ptr + column)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = row < rows
        label = tl.load(labels_ptr + row, mask=inside, other=-1).to(tl.int32)
        largest = tl.load(largest_ptr + row, mask=inside, other=float("inf"))
        scale = tl.load(scale_ptr + row, mask=inside, other=0.0)
        place = logits_ptr + row.to(tl.int64) * columns + column
        logits = tl.load(place, mask=inside, other=0.0).to(tl.float32) + bias
        d_logits = _exp(logits - largest) * scale - (column == label).to(tl.float32)
        tl.store(place, d_logits.to(logits_ptr.dtype.element_ty), mask=inside)
        sums += d_logits
    sums_ptr += tl.program_id(0).to(tl.int64) * columns + column
    tl.store(sums_ptr, tl.load(sums_ptr) + tl.sum(sums, 0, keep_dims=True))


@operation
def linear_cross_entropy_forward(hidden, rows, weight, bias, labels, needs_grad, dtype):
    """See `linear_cross_entropy` of logits_in_chunks.py."""
    return linear_cross_entropy(hidden, rows, weight, bias, labels, needs_grad, dtype, _in_chunks, sum_by_index)


def _in_chunks(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """(losses fp32 [R], correct bool [R], d_x in x's memory, d_weight, d_bias), the last two empty where not wanted."""
    rows, vocabulary = len(x), len(weight)
    columns = padded_columns(vocabulary)
    chunk = equal_chunk(rows, most_rows_on_gpu(columns * x.element_size()))
    padded_bias = F.pad(bias.float(), (0, columns - vocabulary), value=-math.inf)
    losses, correct = x.new_empty(rows, dtype=torch.float32), torch.empty_like(labels, dtype=torch.bool)
    largest, scale = torch.empty_like(losses), torch.empty_like(losses)
    tiles, blocks = ceil_div(min(chunk, rows), _ROWS), columns // _BLOCK
    programs = ceil_div(summing_programs(tiles * blocks, x.device), blocks)
    sums = x.new_zeros((programs, columns), dtype=torch.float32)

    def differentiate(logits: Tensor, some: slice) -> None:
        statistics = labels[some], largest[some], scale[some]
        cross_entropy_kernel[(len(logits),)](
            logits, padded_bias, *statistics, losses[some], correct[some], columns, vocabulary,
            LANES=_LANES, WIDTH=16 // x.element_size(), num_warps=4,
        )  # fmt: skip
        if any(wanted):
            cross_entropy_gradient_kernel[(programs, blocks)](
                logits, padded_bias, *statistics, sums, len(logits), columns, ROWS=_ROWS, BLOCK=_BLOCK, num_warps=4
            )

    d_weight = multiply_in_chunks(x, weight, wanted, chunk, differentiate)
    d_bias = sums.sum(0)[:vocabulary] if wanted[2] else bias.new_empty(0)
    return losses, correct, x, d_weight, d_bias
