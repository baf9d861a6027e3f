"""The launcher of the loss on a CPU: its kernel is compiled, its products are PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bertfast import compiled
from bertfast.kernels import results
from bertfast.kernels.logits_in_chunks import linear_cross_entropy, multiply_in_chunks, padded_columns

_CHUNK = 40 << 20  # bytes of logits: fewer rows make slower products, more of them no faster ones


def linear_cross_entropy_forward(
    hidden: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    wanted: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `linear_cross_entropy` of kernels/logits_in_chunks.py."""
    return linear_cross_entropy(hidden, rows, weight, bias, labels, wanted, dtype, _in_chunks, _sum_by_index)


if compiled.ABSENT is None:
    torch.library.custom_op(
        "bertfast::cpu_linear_cross_entropy_forward", linear_cross_entropy_forward, mutates_args=(), device_types="cpu"
    ).register_fake(results.linear_cross_entropy_forward)


def _in_chunks(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """(loss float64 [], correct int64 [], d_x in x's memory, d_weight, d_bias), the last two empty where not wanted."""
    vocabulary = len(weight)
    most = _rows_of_chunk(padded_columns(vocabulary) * x.element_size())
    chunks = max(-(-len(x) // most), 1)
    loss, correct = x.new_zeros((), dtype=torch.float64), labels.new_zeros(())
    d_bias = x.new_zeros(vocabulary if any(wanted) else 0, dtype=torch.float32)

    def differentiate(logits: Tensor, some: slice) -> None:
        torch.ops.bertfast.cpu_cross_entropy(logits[:, :vocabulary], bias, labels[some], loss, correct, d_bias)

    d_weight = multiply_in_chunks(x, weight, wanted, max(-(-len(x) // chunks), 1), differentiate)
    return loss, correct, x, d_weight, d_bias if wanted[2] else d_bias[:0]


def _rows_of_chunk(row: int) -> int:
    """The most rows of logits in a chunk, of `row` bytes each."""
    return max(_CHUNK // row, 1)


def _sum_by_index(values: Tensor, index: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Sum the rows of `values` [N, H] that have the same `index`, in fp32 and one after another -> [rows, H]."""
    total = values.new_zeros((rows, values.shape[1]), dtype=torch.float32)
    return total.index_add_(0, index, values.float()).to(dtype)
