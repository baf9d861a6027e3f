"""The operators of the masked-LM loss whose kernels are in the native library; PyTorch computes their GEMMs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from bertfast.kernels.logits_in_chunks import (
    equal_chunk,
    gradients_in_chunks,
    linear_cross_entropy,
    max_rows_on_gpu,
    padded_columns,
)
from bertfast.kernels.operation import operation
from bertfast.ops import matmul, native
from bertfast.ops.dispatch import HAS_TRITON, operator
from bertfast.ops.index_checks import check_below

_CPU_BYTES = 40 << 20  # of a chunk of logits on a CPU: with fewer rows GEMMs are slower, with more they are not faster
_Implementation = Literal["cpu", "cuda"]


def _define(implementation: _Implementation) -> None:
    def linear_cross_entropy_forward(
        hidden: Tensor,
        rows: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        labels: Tensor,
        needs_grad: Sequence[bool],
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        if implementation == "cpu":
            check_below("linear_cross_entropy", "labels", labels, len(weight), "weight", negative_is_ignored=True)
        in_chunks = partial(_in_chunks, implementation=implementation)
        return linear_cross_entropy(hidden, rows, weight, bias, labels, needs_grad, dtype, in_chunks, _sum_by_index)

    operation(linear_cross_entropy_forward, implementation)


if native.UNAVAILABLE_REASON is None:
    _define("cpu")
    _define("cuda")


def _in_chunks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    needs_grad: Sequence[bool],
    *,
    implementation: _Implementation,
) -> tuple[Tensor, ...]:
    """Return (losses fp32 [R], correct int64 [R], d_x in x's memory, d_weight, d_bias); gradients may be empty."""
    kernel = operator(implementation, "cross_entropy")
    vocab_size = len(weight)
    max_rows = _max_rows(padded_columns(vocab_size) * x.element_size(), implementation)
    chunk = equal_chunk(len(x), max_rows, 1) if implementation == "cpu" else equal_chunk(len(x), max_rows)
    losses, correct = x.new_empty(len(x), dtype=torch.float32), torch.empty_like(labels)
    d_bias = x.new_zeros(vocab_size if any(needs_grad) else 0, dtype=torch.float32)

    def differentiate(logits: Tensor, chunk_rows: slice) -> None:
        kernel(logits[:, :vocab_size], bias, labels[chunk_rows], losses[chunk_rows], correct[chunk_rows], d_bias)

    d_weight = gradients_in_chunks(x, weight, needs_grad, chunk, differentiate, matmul.matmul_nt)
    return losses, correct, x, d_weight, d_bias if needs_grad[2] else d_bias[:0]


def _max_rows(row: int, implementation: _Implementation) -> int:
    """Return the maximum number of rows of a chunk of logits; a row has `row` bytes."""
    return max(_CPU_BYTES // row, 1) if implementation == "cpu" else max_rows_on_gpu(row)


def _sum_by_index(values: Tensor, index: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Sum the rows of `values` [N, H] with equal `index` (int [N], below `rows`) in fp32, in fixed order: [rows, H]."""
    if values.is_cuda and HAS_TRITON:  # PyTorch would use atomic additions
        from bertfast.kernels.sum_by_index import sum_by_index

        return sum_by_index(values, index, rows, dtype)
    if not values.is_cuda:
        wide = values if values.dtype == dtype != torch.float16 else values.float()
        sums: Tensor = operator("cpu", "gather_backward")(index, [wide], rows)[0]
        return sums.to(dtype)
    total = values.new_zeros((rows, values.shape[1]), dtype=torch.float32)
    return total.index_add_(0, index, values.float()).to(dtype)
