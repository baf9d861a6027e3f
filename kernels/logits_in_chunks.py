"""The masked-LM loss in chunks of logits, in PyTorch alone: shared by the operators of all implementations.

PyTorch's library computes the GEMMs. Between them a kernel computes the loss of a chunk of logits and replaces the
logits by their gradient in place, d_logits = softmax(logits) - onehot(label), so that one buffer serves all chunks.

T tokens, R rows, V vocabulary size; C columns of the buffer: V rounded up, so that rows are aligned to cache lines.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_ALIGNED = 64  # C is a multiple of this
_GPU_BYTES = 256 << 20  # bound on the memory of a chunk of logits on a GPU
_GEMM_ROWS = 128  # rows of a GEMM tile
_ROUNDINGS = 8  # chunks after which d_weight may be rounded: the error is then twice that of a single rounding
_CPU_GEMM_ROWS = 1024  # rows of the weight per GEMM: 1.4 times as fast in MKL as one GEMM with all rows


def linear_cross_entropy(
    hidden: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    needs_grad: Sequence[bool],
    dtype: torch.dtype,
    in_chunks: Callable[..., tuple[Tensor, ...]],
    sum_by_index: Callable[[Tensor, Tensor, int, torch.dtype], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the loss of `hidden` W^T + bias summed over rows, and its gradients.

    Args:
        hidden: [T, H].
        rows: int [R], the rows of `hidden` to read; None: all rows in order, R = T.
        weight: [V, H].
        bias: [V].
        labels: int [R]; rows with a negative label are ignored.
        needs_grad: Whether the gradients of hidden, weight and bias are needed.
        dtype: Dtype of the GEMMs.
        in_chunks: (x [R, H], weight, bias, labels, needs_grad) -> losses and correct counts, per row or summed, d_x,
            d_weight, d_bias.
        sum_by_index: (d_x, rows, T, dtype) -> d_hidden.

    Returns:
        (loss fp32 [], correct int64 [], counted int64 [], d_hidden [T, H], d_weight [V, H], d_bias [V]); gradients have
        the dtypes of their tensors, and are empty if not needed.
    """
    labels = labels.long().contiguous()
    counted = labels >= 0
    # Ignored rows may hold anything, NaN included. d_x will overwrite this copy.
    x = (hidden if rows is None else hidden.index_select(0, rows)).masked_fill(~counted[:, None], 0).to(dtype)
    losses, correct, d_x, d_weight, d_bias = in_chunks(x, weight, bias, labels, needs_grad)
    if not needs_grad[0]:
        d_hidden = hidden.new_empty(0)
    elif rows is None:
        d_hidden = d_x.to(hidden.dtype)
    else:
        d_hidden = sum_by_index(d_x, rows, len(hidden), hidden.dtype)
    loss = losses.sum(dtype=torch.float32)
    return loss, correct.sum(), counted.sum(), d_hidden, d_weight.to(weight.dtype), d_bias.to(bias.dtype)


def matmul_nt(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Write a b^T to `out`, or add it: a [N, K], b [M, K], out [N, M], all of one dtype."""
    if add:
        torch.addmm(out, a, b.mT, out=out)
    else:
        torch.mm(a, b.mT, out=out)


def gradients_in_chunks(
    x: Tensor,
    weight: Tensor,
    needs_grad: Sequence[bool],
    chunk: int,
    differentiate: Callable[[Tensor, slice], None],
    matmul_nt: Callable[..., None] = matmul_nt,
) -> Tensor:
    """Compute logits and their gradients chunk by chunk; return d_weight, and overwrite x by d_x.

    Args:
        x: [R, H], in the dtype of the GEMMs; becomes d_x if that is needed.
        weight: [V, H].
        needs_grad: Whether the gradients of x, weight and bias are needed.
        chunk: Rows of a chunk.
        differentiate: (padded [chunk, C], slice of the rows): replaces the logits padded[:, :V], without bias, by their
            gradient; the other columns are zero.
        matmul_nt: A function that does the same as the one here.

    Returns:
        d_weight [V, H], empty if not needed.
    """
    x_needs_grad, weight_needs_grad, _ = needs_grad
    rows, vocab_size = len(x), len(weight)
    buffer = x.new_empty((min(chunk, rows), padded_columns(vocab_size)))
    buffer[:, vocab_size:] = 0
    matrix = weight.to(x.dtype)
    keeps_dtype = weight.dtype == x.dtype and rows <= _ROUNDINGS * chunk
    d_weight = weight.new_empty(
        weight.shape if weight_needs_grad else 0, dtype=x.dtype if keeps_dtype else torch.float32
    )
    for start in range(0, max(rows, 1), chunk):  # zero rows make one empty chunk, whose gradients are zero
        chunk_rows = slice(start, start + chunk)
        rows_of_chunk = x[chunk_rows]
        padded = buffer[: len(rows_of_chunk)]
        logits = padded[:, :vocab_size]
        for block in _blocks(matrix):
            matmul_nt(rows_of_chunk, matrix[block], logits[:, block])
        differentiate(padded, chunk_rows)
        if weight_needs_grad:
            _accumulate_matmul(matmul_nt, d_weight, logits.mT, rows_of_chunk, first=start == 0)
        if x_needs_grad:
            matmul_nt(logits, matrix.mT, rows_of_chunk)  # the chunk's rows of x are no longer needed
    return d_weight


def max_rows_on_gpu(row: int) -> int:
    """Return the maximum rows of a chunk of logits on a GPU, of `row` bytes each: 256 MiB, but 1,024 to 4,096 rows.

    Each chunk reads and writes all of d_weight, so few chunks are faster even where their logits do not stay in L2.
    """
    return min(max(_GPU_BYTES // row // _GEMM_ROWS * _GEMM_ROWS, 1024), 4096)


def equal_chunk(rows: int, max_rows: int, multiple: int = _GEMM_ROWS) -> int:
    """Return the chunk size that splits `rows` into the fewest chunks of at most `max_rows`, all of similar size.

    The result is a multiple of `multiple` if `max_rows` allows it.
    """
    chunks = max(-(-rows // max_rows), 1)
    chunk = max(-(-rows // chunks), 1)
    return min(-(-chunk // multiple) * multiple, max_rows)


def padded_columns(vocab_size: int) -> int:
    """Return C, the columns of the logits' buffer, for a vocabulary size V."""
    return -(-vocab_size // _ALIGNED) * _ALIGNED


def _blocks(matrix: Tensor) -> list[slice]:
    step = len(matrix) if matrix.is_cuda else _CPU_GEMM_ROWS
    return [slice(start, start + step) for start in range(0, len(matrix), step)]


def _accumulate_matmul(matmul_nt: Callable[..., None], total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Add a b to `total`, of the same or a wider dtype; overwrite `total` if `first`."""
    if total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    elif total.dtype == a.dtype:
        for block in _blocks(a):
            matmul_nt(a[block], b.mT, total[block], add=not first)
    else:  # GEMMs on a CPU have one dtype: each partial result is rounded, their sum is not
        for block in _blocks(a):
            partial = a[block] @ b
            total[block] = partial if first else total[block] + partial
