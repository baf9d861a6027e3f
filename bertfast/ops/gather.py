"""Rows of activations, gathered; the gradient is a deterministic sum by index.

PyTorch's gradient of `x[rows]` on a GPU sorts the rows once for each tensor and adds duplicates one after another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bertfast.ops.arguments import Arguments
from bertfast.ops.dispatch import Implementation, operator, resolve, run
from bertfast.ops.index_checks import check_below
from bertfast.runtime.torch_compat import is_batched, is_transformed

_ARGUMENTS = Arguments("gather", rows="integer [rows]", tensors="each floating [tokens, hidden]")


def gather(rows: Tensor, *tensors: Tensor, implementation: Implementation | None = None) -> tuple[Tensor, ...]:
    """Return x[rows] of each tensor. All orders of derivatives are deterministic, except under `torch.func`.

    Args:
        rows: int [R], in 0 … T - 1; a row may be named more than once.
        tensors: Each [T, H], floating point. Their gradients share the work on `rows`.
        implementation: Of the gradient: "triton", "cpu" or "reference".

    Returns:
        [R, H] for each tensor, in its dtype.

    Raises:
        TypeError: No tensor is given, or one has a dtype that is not supported.
        IndexError: A row is negative, or T or more, on a CPU. On a GPU a device-side assertion fails.
    """
    if not tensors:
        raise TypeError("gather: no tensor to read rows of: gather(rows, x)")
    _ARGUMENTS.check(rows, *tensors)
    check_below("gather", "rows", rows, len(tensors[0]), "tensors[0]")
    chosen = {resolve("gather", implementation, x) for x in tensors}
    if is_transformed():  # `Gather` has no rules for transforms
        return tuple(x.index_select(0, rows) for x in tensors)
    return run(Gather, "reference" if len(chosen) > 1 else chosen.pop(), rows, *tensors)


class Gather(torch.autograd.Function):
    """tensors -> their `rows`."""

    # Without a gradient, torch.compile drops the context where the arguments are one more than the parameters.
    @staticmethod
    def forward(ctx, implementation, rows, first, *others):
        tensors = (first, *others)
        ctx.implementation, ctx.tokens = implementation, tensors[0].shape[0]
        ctx.save_for_backward(rows)
        return tuple(x.index_select(0, rows) for x in tensors)

    @staticmethod
    def backward(ctx, *d_ys):
        (rows,) = ctx.saved_tensors
        # The kernels take no batch of gradients.
        batched = any(d_y is not None and is_batched(d_y) for d_y in d_ys)
        implementation = "reference" if batched else ctx.implementation
        needed = [i for i, needs_grad in enumerate(ctx.needs_input_grad[2:]) if needs_grad]
        # A compiled graph has no second derivative, and its compiler takes no Function inside of a backward pass.
        sum_by_index = _sum_by_index if torch.compiler.is_compiling() or batched else SumByIndex.apply
        sums = sum_by_index(implementation, rows, ctx.tokens, *(d_ys[i] for i in needed))
        gradients = dict(zip(needed, sums, strict=True))
        return None, None, *(gradients.get(i) for i in range(len(d_ys)))


class SumByIndex(torch.autograd.Function):
    """values [R, H] each -> [T, H], the sum of the values whose row it is: the transpose of `Gather`."""

    @staticmethod
    def forward(ctx, implementation, rows, tokens, *values):
        ctx.implementation = implementation
        ctx.save_for_backward(rows)
        return _sum_by_index(implementation, rows, tokens, *values)

    @staticmethod
    def backward(ctx, *d_tables):
        (rows,) = ctx.saved_tensors
        return None, None, None, *Gather.apply(ctx.implementation, rows, *d_tables)


def _sum_by_index(implementation: str, rows: Tensor, tokens: int, *values: Tensor) -> tuple[Tensor, ...]:
    """Return the sum of the values [R, H] at each row [T, H]; half precisions are summed in fp32."""
    if implementation != "reference":
        return tuple(operator(implementation, "gather_backward")(rows, values, tokens))
    sums = []
    for x in values:
        total = x.new_zeros((tokens, x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))
        sums.append(total.index_add_(0, rows, x.to(total.dtype)).to(x.dtype))
    return tuple(sums)
