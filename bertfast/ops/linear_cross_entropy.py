"""The masked-LM loss: gather, product with the vocabulary, softmax and loss, without ever holding all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from bertfast import reference
from bertfast.ops.choice import Implementation, check, choose


def linear_cross_entropy(
    hidden: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    *,
    implementation: Implementation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of hidden[rows] W^T + bias against labels, summed.

    Args:
        hidden: [T, H], floating point.
        rows: int64 [R], the rows of hidden that are read; a row may be named more than once.
        weight: [V, H]; bias: [V].
        labels: int64 [R], in 0 … V - 1; a negative one (-100) makes its row inert. No label at all: loss 0.

    Returns:
        The sum of the losses (fp32, or float64 from float64; differentiable), the number of rows whose largest logit
        is the label, and the number of labels: three 0-dimensional tensors, the last two int64.
    """
    check(
        "linear_cross_entropy",
        hidden=(hidden, "tokens hidden", "floating"),
        rows=(rows, "rows", "integer"),
        weight=(weight, "vocabulary hidden", "floating"),
        bias=(bias, "vocabulary", "floating"),
        labels=(labels, "rows", "integer"),
    )
    choose("linear_cross_entropy", implementation, hidden)
    # Asked here: inside the Function, a parameter seems to want its gradient even where none are recorded.
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight, bias))
    return LinearCrossEntropy.apply(hidden, rows, weight, bias, labels, wanted)


class LinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed beside the loss, chunk by chunk; the backward pass only scales them."""

    @staticmethod
    def forward(ctx, hidden, rows, weight, bias, labels, wanted):
        loss, correct, counted, gradients = reference.linear_cross_entropy_forward(
            hidden, rows, weight, bias, labels, wanted
        )
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(correct, counted)
        return loss, correct, counted

    @staticmethod
    def backward(ctx, d_loss, _correct, _counted):
        d_hidden, d_weight, d_bias = (None if d is None else d * d_loss.to(d.dtype) for d in ctx.saved_tensors)
        return d_hidden, None, d_weight, d_bias, None, None
