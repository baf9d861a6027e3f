"""The masked-LM loss of the compiled library: the products are PyTorch's, everything between them is one kernel.

Rows go through the vocabulary in chunks: a product, the kernel, which reads the losses off the logits and leaves their
gradient in their place, and two products. T tokens, R rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bertfast.kernels.operation import operation

_CHUNK = 48 << 20  # bytes of logits that exist at a time: products of fewer rows are slower


def linear_cross_entropy_forward(
    hidden: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    wanted: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss fp32 [], correct and counted int64 [], d_hidden [T, H], d_weight [V, H], d_bias [V]), products in `dtype`.

    The gradients are those of the loss, each in the dtype of what it is of; where not `wanted` they come empty.
    """
    hidden_wanted, weight_wanted, bias_wanted = wanted
    labels = labels.long()
    counted = labels >= 0
    x = hidden.index_select(0, rows).masked_fill_(~counted[:, None], 0).to(dtype)  # an unused place may hold anything
    matrix = weight.to(dtype)
    losses, correct = x.new_empty(len(x), dtype=torch.float32), torch.empty_like(labels, dtype=torch.bool)
    d_weight = torch.zeros_like(weight, dtype=torch.float32) if weight_wanted else weight.new_empty(0)
    d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias_wanted else bias.new_empty(0)
    chunk = max(_CHUNK // (len(weight) * dtype.itemsize), 1)
    buffer = x.new_empty((min(chunk, len(x)), len(weight)))
    for start in range(0, len(x), chunk):
        some = slice(start, start + chunk)
        part = x[some]
        logits = buffer[: len(part)]
        torch.mm(part, matrix.mT, out=logits)
        d_logits_sum = torch.ops.bertfast.cpu_cross_entropy(
            logits, bias, labels[some], losses[some], correct[some], any(wanted)
        )
        if bias_wanted:
            d_bias += d_logits_sum
        if weight_wanted:
            _add_product(d_weight, logits.mT, part)
        if hidden_wanted:
            torch.mm(logits, matrix, out=part)  # which has been read
    d_hidden = hidden.new_empty(0)
    if hidden_wanted:  # one row may be read twice
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32).index_add_(0, rows, x.float()).to(hidden.dtype)
    d_weight, d_bias = d_weight.to(weight.dtype), d_bias.to(bias.dtype)
    return losses.sum(), correct.sum(), counted.sum(), d_hidden, d_weight, d_bias


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to `total`, fp32, which a CPU's library does in one product for fp32 alone."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def register() -> None:
    """Make it an operation, as the library's own are."""
    operation(linear_cross_entropy_forward, "cpu")
