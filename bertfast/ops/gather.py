"""Gathered rows of activations, whose gradient is a deterministic sum by index.

On a GPU, PyTorch's gradient of `x[rows]` sorts the rows once per tensor and adds duplicates one after another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bertfast.ops.arguments import Arguments
from bertfast.ops.dispatch import Implementation, operator, resolve, run
from bertfast.ops.index_checks import check_below
from bertfast.runtime.torch_compat import is_batched, is_transformed

_ARGUMENTS = Arguments("gather", rows="integer [rows]", tensors="each floating [tokens, hidden]")


def gather(rows: Tensor, *tensors: Tensor, implementation: Implementation | None = None) -> tuple[Tensor, ...]:
    """Return x[rows] of each tensor. Derivatives of all orders are deterministic, except under `torch.func`.

    Args:
        rows: int [R], in 0 … T - 1; a row may occur more than once.
        tensors: Each [T, H], floating point. Their gradients share one sort of `rows`.
        implementation: Implementation of the gradient: "triton", "cpu" or "reference"; None: the fastest.

    Returns:
        [R, H] for each tensor, in its dtype.

    Raises:
        TypeError: There is no tensor, or one has an unsupported dtype.
        ValueError: Shapes or devices do not match, or `implementation` does not support the tensors.
        IndexError: On a CPU, a row is negative, or T or more. On a GPU a device-side assertion fails.
    """
    if not tensors:
        raise TypeError("gather: at least one tensor is required: gather(rows, x)")
    _ARGUMENTS.check(rows, *tensors)
    check_below("gather", "rows", rows, len(tensors[0]), "tensors[0]")
    resolved = {resolve("gather", implementation, x) for x in tensors}
    if is_transformed():  # `Gather` has no rules for transforms
        return tuple(x.index_select(0, rows) for x in tensors)
    y: tuple[Tensor, ...] = run(Gather, "reference" if len(resolved) > 1 else resolved.pop(), rows, *tensors)
    return y


class Gather(torch.autograd.Function):
    """The rows of one or more tensors."""

    # `first` is a parameter of its own because torch.compile, if no gradient is needed, drops the context where there
    # are more arguments than parameters.
    @staticmethod
    def forward(
        ctx: Any, implementation: Implementation, rows: Tensor, first: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        tensors = (first, *others)
        ctx.implementation, ctx.tokens = implementation, tensors[0].shape[0]
        ctx.save_for_backward(rows)
        return tuple(x.index_select(0, rows) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *d_ys: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        # The kernels do not support a batch of gradients.
        batched = any(d_y is not None and is_batched(d_y) for d_y in d_ys)
        implementation = "reference" if batched else ctx.implementation
        needed = [i for i, needs_grad in enumerate(ctx.needs_input_grad[2:]) if needs_grad]
        arguments = implementation, rows, ctx.tokens, *(d_ys[i] for i in needed)
        # A compiled graph has no second derivative, and the compiler does not support a Function in a backward pass.
        plain = torch.compiler.is_compiling() or batched
        sums = _sum_by_index(*arguments) if plain else run(SumByIndex, *arguments)
        gradients = dict(zip(needed, sums, strict=True))
        return None, None, *(gradients.get(i) for i in range(len(d_ys)))


class SumByIndex(torch.autograd.Function):
    """The transpose of `Gather`: for each of T rows, the sum of the values [R, H] with this row index."""

    @staticmethod
    def forward(
        ctx: Any, implementation: Implementation, rows: Tensor, tokens: int, *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.implementation = implementation
        ctx.save_for_backward(rows)
        return _sum_by_index(implementation, rows, tokens, *values)

    @staticmethod
    def backward(ctx: Any, *d_tables: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        return None, None, None, *run(Gather, ctx.implementation, rows, *d_tables)


def _sum_by_index(implementation: Implementation, rows: Tensor, tokens: int, *values: Tensor) -> tuple[Tensor, ...]:
    """Return the sum of the values [R, H] by row index, [T, H] each; half precisions are summed in fp32."""
    if implementation != "reference":
        return tuple(operator(implementation, "gather_backward")(rows, values, tokens))
    sums = []
    for x in values:
        total = x.new_zeros((tokens, x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))
        sums.append(total.index_add_(0, rows, x.to(total.dtype)).to(x.dtype))
    return tuple(sums)
