"""The masked-LM loss in chunks of logits: what its launchers share, in PyTorch alone.

The library multiplies. Between its products an implementation reads a chunk's logits for the loss and turns them into
their gradient in place, d_logits = softmax(logits) - onehot(label), so that all passes over a chunk meet in one buffer.

T tokens, R rows, V vocabulary; C columns of the buffer: V, and what brings every row to a whole number of cache lines.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_ALIGNED = 64  # what C is a multiple of
_GPU_BYTES = 256 << 20  # of a chunk of logits on a GPU, the bound on the memory that logits take there
_GEMM_ROWS = 128  # rows of a GEMM's tile
_ROUNDINGS = 8  # chunks whose shares of d_weight may each be rounded: the error is then twice that of one rounding
_ON_CPU = 1024  # rows of the weight in a product: MKL gets through them 1.4 times as fast as through all at once


def linear_cross_entropy(
    hidden: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    wanted: Sequence[bool],
    dtype: torch.dtype,
    in_chunks: Callable[..., tuple[Tensor, ...]],
    sum_by_index: Callable[[Tensor, Tensor, int, torch.dtype], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss fp32 [], correct and counted int64 [], d_hidden [T, H], d_weight [V, H], d_bias [V]), products in `dtype`.

    The gradients are those of the loss, each in the dtype of what it is of; where not `wanted` they come empty.
    Without `rows`, all rows of hidden are read in order, R = T, and nothing is gathered, sorted or summed.

    `in_chunks` makes of x [R, H], weight, bias, labels int64 [R] and `wanted` the losses and how many are correct, for
    each row or summed, d_x, d_weight and d_bias; `sum_by_index` makes d_hidden of d_x, rows, T and its dtype.
    """
    labels = labels.long().contiguous()
    counted = labels >= 0
    # A row without a label may hold anything, NaN too. The copy is also what d_x overwrites.
    x = (hidden if rows is None else hidden.index_select(0, rows)).masked_fill(~counted[:, None], 0).to(dtype)
    losses, correct, d_x, d_weight, d_bias = in_chunks(x, weight, bias, labels, wanted)
    if not wanted[0]:
        d_hidden = hidden.new_empty(0)
    elif rows is None:
        d_hidden = d_x.to(hidden.dtype)
    else:
        d_hidden = sum_by_index(d_x, rows, len(hidden), hidden.dtype)
    loss = losses.sum(dtype=torch.float32)
    return loss, correct.sum(), counted.sum(), d_hidden, d_weight.to(weight.dtype), d_bias.to(bias.dtype)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Write a b^T to `out`, or add it: a [N, K], b [M, K], out [N, M], all of one dtype."""
    if add:
        torch.addmm(out, a, b.mT, out=out)
    else:
        torch.mm(a, b.mT, out=out)


def multiply_in_chunks(
    x: Tensor,
    weight: Tensor,
    wanted: Sequence[bool],
    chunk: int,
    differentiate: Callable[[Tensor, slice], None],
    multiply: Callable[..., None] = multiply,
) -> Tensor:
    """d_weight, empty where not wanted; x [R, H], of the dtype of the products, becomes d_x where that is.

    `differentiate(padded, some)` turns the logits padded[:, :V] of `some` rows, without bias, into their gradient;
    behind them `padded` [chunk, C] is zero. `multiply` may be a faster one that does the same.
    """
    x_wanted, weight_wanted, _ = wanted
    rows, vocabulary = len(x), len(weight)
    buffer = x.new_empty((min(chunk, rows), padded_columns(vocabulary)))
    buffer[:, vocabulary:] = 0
    matrix = weight.to(x.dtype)
    as_it_is = weight.dtype == x.dtype and rows <= _ROUNDINGS * chunk
    d_weight = weight.new_empty(weight.shape if weight_wanted else 0, dtype=x.dtype if as_it_is else torch.float32)
    for start in range(0, max(rows, 1), chunk):  # no rows are one chunk, whose gradients are zero
        some = slice(start, start + chunk)
        part = x[some]
        padded = buffer[: len(part)]
        logits = padded[:, :vocabulary]
        for block in _blocks(matrix):
            multiply(part, matrix[block], logits[:, block])
        differentiate(padded, some)
        if weight_wanted:
            _add_product(multiply, d_weight, logits.mT, part, first=start == 0)
        if x_wanted:
            multiply(logits, matrix.mT, part)  # which has been read for the last time
    return d_weight


def most_rows_on_gpu(row: int) -> int:
    """Return the most rows of a chunk of logits on a GPU, of `row` bytes each: what fits in 256 MiB, 1,024 to 4,096.

    Each chunk reads and writes all of d_weight, so few chunks are faster even where their logits do not stay in L2.
    """
    return min(max(_GPU_BYTES // row // _GEMM_ROWS * _GEMM_ROWS, 1024), 4096)


def equal_chunk(rows: int, most: int, multiple: int = _GEMM_ROWS) -> int:
    """Return the rows of a chunk if `rows` are cut into the fewest chunks of at most `most`, all of about one size.

    The result is a `multiple` where `most` allows it.
    """
    chunks = max(-(-rows // most), 1)
    chunk = max(-(-rows // chunks), 1)
    return min(-(-chunk // multiple) * multiple, most)


def padded_columns(vocabulary: int) -> int:
    """C of V."""
    return -(-vocabulary // _ALIGNED) * _ALIGNED


def _blocks(matrix: Tensor) -> list[slice]:
    step = len(matrix) if matrix.is_cuda else _ON_CPU
    return [slice(start, start + step) for start in range(0, len(matrix), step)]


def _add_product(multiply: Callable[..., None], total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Add a b to `total` of that or a wider dtype; the `first` time write it there."""
    if total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    elif total.dtype == a.dtype:
        for block in _blocks(a):
            multiply(a[block], b.mT, total[block], add=not first)
    else:  # on a CPU the library's products are of one dtype: each share is rounded, their sum is not
        for block in _blocks(a):
            share = a[block] @ b
            total[block] = share if first else total[block] + share
