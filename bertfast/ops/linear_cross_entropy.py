"""The masked-LM loss: gather, product with the vocabulary, softmax and loss, without ever holding all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from bertfast.ops import linear_cross_entropy_fallback as fallback
from bertfast.ops import (
    linear_cross_entropy_native,  # noqa: F401  importing it registers its launchers
    reference,
)
from bertfast.ops.arguments import Arguments
from bertfast.ops.dispatch import Implementation, gemm_dtype, operator, resolve, run
from bertfast.ops.double_backward import must_be_differentiable, reference_gradients
from bertfast.ops.index_checks import check_below
from bertfast.runtime.torch_compat import backward_retains_graph, is_batched, is_transformed

_ALL_ROWS, _SOME_ROWS = (
    Arguments(
        "linear_cross_entropy",
        hidden="floating [tokens, hidden]",
        weight="floating [vocabulary, hidden]",
        bias="floating [vocabulary]",
        **of_rows,
    )
    for of_rows in ({"labels": "integer [tokens]"}, {"rows": "integer [rows]", "labels": "integer [rows]"})
)


def linear_cross_entropy(
    hidden: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    *,
    implementation: Implementation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of hidden[rows] W^T + bias against labels, summed.

    Args:
        hidden: [T, H], floating point.
        rows: int [R], the rows of hidden that are read; a row may be named more than once. None: all rows in order,
            R = T, which is faster than naming them.
        weight: [V, H]; bias: [V].
        labels: int [R], in 0 … V - 1; the row of a negative one (-100) is ignored. Without labels the loss is 0.

    Returns:
        The sum of the losses (fp32, or float64 from float64; differentiable), the number of rows whose largest logit
        is the label, and the number of labels: three 0-dimensional tensors, the last two int64.

    Raises:
        IndexError: A label is V or more, or a row is not one of hidden's, on a CPU. On a GPU, where a check would wait
            for the device, such a label makes the loss NaN, and such a row fails a device-side assertion.
    """
    if rows is None:
        _ALL_ROWS.check(hidden, weight, bias, labels)
    else:
        _SOME_ROWS.check(hidden, weight, bias, rows, labels)
        check_below("linear_cross_entropy", "rows", rows, len(hidden), "hidden")
    dtype = gemm_dtype(hidden, weight)
    unsupported = (
        "a CPU's kernel takes no float16" if dtype == torch.float16 and implementation in (None, "cpu") else None
    )
    requested = implementation
    implementation = resolve("linear_cross_entropy", requested, hidden, None if hidden.is_cuda else unsupported)
    if implementation == "reference":
        check_below("linear_cross_entropy", "labels", labels, len(weight), "weight", negative_is_ignored=True)
        if requested == "reference" or is_transformed():  # else what computes the same in less memory
            return reference.linear_cross_entropy(hidden, rows, weight, bias, labels)
    # Asked here: inside the Function, a parameter seems to want its gradient even where none are recorded.
    needs_grad = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight, bias))
    return run(LinearCrossEntropy, implementation, hidden, rows, weight, bias, labels, needs_grad, dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed beside the loss, chunk by chunk; the backward pass only scales them.

    `dtype` is that of the kernels' GEMMs.
    """

    @staticmethod
    def forward(ctx, implementation, hidden, rows, weight, bias, labels, needs_grad, dtype):
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
    def backward(ctx, d_loss, _correct, _counted):
        *gradients, hidden, rows, weight, bias, labels = ctx.saved_tensors
        if must_be_differentiable():

            def definition(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                half = (x.to(ctx.dtype) for x in (weight, bias))  # as autocast had it
                return reference.linear_cross_entropy(hidden.to(ctx.dtype), rows, *half, labels)[0]

            found = reference_gradients(definition, (hidden, weight, bias), ctx.needs_grad, [d_loss])
            return None, found[0], None, *found[1:], None, None, None
        # No second d_weight: what no other pass will ask for is scaled where it is. (A compiler sees to that itself.)
        kept = torch.compiler.is_compiling() or backward_retains_graph() or is_batched(d_loss)
        scale = torch.mul if kept else Tensor.mul_
        d_hidden, d_weight, d_bias = (
            scale(gradient, d_loss.to(gradient.dtype)) if needed else None
            for gradient, needed in zip(gradients, ctx.needs_grad, strict=True)
        )
        return None, d_hidden, None, d_weight, d_bias, None, None, None
