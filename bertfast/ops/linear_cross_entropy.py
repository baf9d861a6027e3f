"""The masked-LM loss: gather, GEMM with the vocabulary, softmax and loss. The full logits are never materialised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bertfast.ops import linear_cross_entropy_fallback as fallback
from bertfast.ops import (
    linear_cross_entropy_native,  # noqa: F401  importing it registers its operators
    reference,
)
from bertfast.ops.arguments import Arguments
from bertfast.ops.dispatch import Implementation, gemm_dtype, operator, resolve, run
from bertfast.ops.double_backward import must_be_differentiable, reference_gradients
from bertfast.ops.index_checks import check_below
from bertfast.runtime.torch_compat import backward_retains_graph, is_batched, is_transformed

_ALL_ROWS, _SELECTED_ROWS = (
    Arguments(
        "linear_cross_entropy",
        hidden="floating [tokens, hidden]",
        weight="floating [vocab_size, hidden]",
        bias="optional floating [vocab_size]",
        **of_rows,
    )
    for of_rows in ({"labels": "integer [tokens]"}, {"rows": "integer [rows]", "labels": "integer [rows]"})
)


def linear_cross_entropy(
    hidden: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    implementation: Implementation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the sum of the cross-entropy losses of hidden[rows] W^T + bias against labels.

    Args:
        hidden: [T, H], floating point.
        rows: int [R], the rows of hidden to read; a row may occur more than once. None: all rows in order, R = T, which
            is faster than listing them.
        weight: [V, H].
        bias: [V]; None: no bias.
        labels: int [R], in 0 … V - 1; rows with a negative label (-100) are ignored. Without labels the loss is 0.
        implementation: Default: the fastest one that supports the arguments.

    Returns:
        (loss, correct, counted), tensors []: the differentiable sum of the losses, fp32 or, for float64, float64; the
        number of rows whose first largest logit is the label, int64; and the number of labels, int64.

    Raises:
        TypeError: An argument has an unsupported dtype.
        ValueError: Shapes or devices do not match, or `implementation` does not support the arguments.
        IndexError: On a CPU, a label is V or more, or a row is not a row of hidden. On a GPU, where a check would wait
            for the device, such a label makes the loss NaN, and such a row fails a device-side assertion.
    """
    if rows is None:
        _ALL_ROWS.check(hidden, weight, bias, labels)
    else:
        _SELECTED_ROWS.check(hidden, weight, bias, rows, labels)
        check_below("linear_cross_entropy", "rows", rows, len(hidden), "hidden")
    if not len(weight):
        raise ValueError("linear_cross_entropy: weight must have at least one row, that of a label")
    if bias is None:
        bias = weight.new_zeros(weight.shape[0])  # next to the logits it takes no time
    dtype = gemm_dtype(hidden, weight)
    unsupported = None
    if dtype == torch.float16 and implementation in (None, "cpu") and not hidden.is_cuda:
        unsupported = "its kernel for CPUs does not support float16"
    requested = implementation
    implementation = resolve("linear_cross_entropy", requested, hidden, unsupported)
    if implementation == "reference":
        check_below("linear_cross_entropy", "labels", labels, len(weight), "weight", negative_is_ignored=True)
        if requested == "reference" or is_transformed():  # by default, a fallback that computes the same in less memory
            return reference.linear_cross_entropy(hidden, rows, weight, bias, labels)
    # Inside the Function, parameters seem to require gradients even if gradients are disabled.
    needs_grad = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight, bias))
    output: tuple[Tensor, Tensor, Tensor] = run(
        LinearCrossEntropy, implementation, hidden, rows, weight, bias, labels, needs_grad, dtype
    )
    return output


class LinearCrossEntropy(torch.autograd.Function):
    """The loss, whose forward pass also computes the gradients, chunk by chunk; the backward pass scales them.

    `dtype` is that of the kernels' GEMMs.
    """

    @staticmethod
    def forward(
        ctx: Any, implementation: Implementation, hidden: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor,
        labels: Tensor, needs_grad: tuple[bool, bool, bool], dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        inputs = (hidden, rows, weight, bias, labels)
        if implementation == "reference":
            results = fallback.linear_cross_entropy_forward(*inputs, needs_grad)
        else:
            results = operator(implementation, "linear_cross_entropy_forward")(*inputs, needs_grad, dtype)
        loss, correct, counted, *gradients = results
        ctx.needs_grad, ctx.dtype = needs_grad, dtype
        ctx.save_for_backward(*gradients, *inputs)
        ctx.mark_non_differentiable(correct, counted)
        return loss, correct, counted

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _correct: Tensor, _counted: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, hidden, rows, weight, bias, labels = ctx.saved_tensors
        if must_be_differentiable():

            def definition(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                hidden, weight, bias = (x.to(ctx.dtype) for x in (hidden, weight, bias))  # as autocast did
                return reference.linear_cross_entropy(hidden, rows, weight, bias, labels)[0]

            found = reference_gradients(definition, (hidden, weight, bias), ctx.needs_grad, [d_loss])
            return None, found[0], None, *found[1:], None, None, None
        # Scale in place if no other backward pass will read the gradients, which saves a second d_weight. (A compiler
        # does that itself.)
        is_kept = torch.compiler.is_compiling() or backward_retains_graph() or is_batched(d_loss)
        scale = torch.mul if is_kept else Tensor.mul_
        d_hidden, d_weight, d_bias = (
            scale(gradient, d_loss.to(gradient.dtype)) if needed else None
            for gradient, needed in zip(gradients, ctx.needs_grad, strict=True)
        )
        return None, d_hidden, None, d_weight, d_bias, None, None, None
