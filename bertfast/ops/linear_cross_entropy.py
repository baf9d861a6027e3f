"""The masked-LM loss: gather, product with the vocabulary, softmax and loss, without ever holding all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from bertfast import reference
from bertfast.ops import loss_in_library  # noqa: F401  importing it registers its launchers
from bertfast.ops.choice import Implementation, check, choose, launcher, product_dtype, run
from bertfast.runtime.torch_compat import backward_retains_graph


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
    dtype = product_dtype(hidden, weight)
    refusal = "a CPU's kernel takes no float16" if dtype == torch.float16 and implementation in (None, "cpu") else None
    implementation = choose("linear_cross_entropy", implementation, hidden, None if hidden.is_cuda else refusal)
    # Asked here: inside the Function, a parameter seems to want its gradient even where none are recorded.
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight, bias))
    return run(LinearCrossEntropy, implementation, hidden, rows, weight, bias, labels, wanted, dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed beside the loss, chunk by chunk; the backward pass only scales them.

    `dtype` is that of the kernels' products.
    """

    @staticmethod
    def forward(ctx, implementation, hidden, rows, weight, bias, labels, wanted, dtype):
        inputs = (hidden, rows, weight, bias, labels, wanted)
        if implementation == "reference":
            loss, correct, counted, *gradients = reference.linear_cross_entropy_forward(*inputs)
        else:
            loss, correct, counted, *gradients = launcher(implementation, "linear_cross_entropy_forward")(
                *inputs, dtype
            )
        ctx.wanted = wanted
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(correct, counted)
        return loss, correct, counted

    @staticmethod
    def backward(ctx, d_loss, _correct, _counted):
        # No second d_weight: what no other pass will ask for is scaled where it is. (A compiler sees to that itself.)
        kept = torch.compiler.is_compiling() or backward_retains_graph()
        scale = torch.mul if kept else Tensor.mul_
        d_hidden, d_weight, d_bias = (
            scale(d, d_loss.to(d.dtype)) if want else None
            for d, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)
        )
        return None, d_hidden, None, d_weight, d_bias, None, None, None
