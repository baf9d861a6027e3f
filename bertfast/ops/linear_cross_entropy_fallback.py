"""The masked-LM loss in plain PyTorch where no kernel supports it: the reference, in chunks of logits.

The gradients are computed with the loss, by two GEMMs per chunk; later they would take a third one for the logits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast.ops.reference_parts import accumulating

_LOGIT_ELEMENTS = 1 << 24  # elements of a chunk of logits


def linear_cross_entropy_forward(
    hidden: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    needs_grad: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Compute `reference.linear_cross_entropy` and its gradients.

    Args:
        hidden: [T, H].
        rows: int [R], or None for all rows of hidden.
        weight: [V, H].
        bias: [V].
        labels: int [R].
        needs_grad: Whether the gradients of hidden, weight and bias are required.

    Returns:
        (loss [], correct int64 [], counted int64 [], d_hidden [T, H], d_weight [V, H], d_bias [V]); gradients that are
        not required are None.
    """
    loss = accumulating(hidden.new_zeros(()))
    correct = labels.new_zeros(())
    d_hidden, d_weight, d_bias = (
        torch.zeros_like(x, dtype=loss.dtype) if needed else None
        for x, needed in zip((hidden, weight, bias), needs_grad, strict=True)
    )
    if rows is None:
        rows = torch.arange(len(labels), device=labels.device)
    size = max(_LOGIT_ELEMENTS // weight.shape[0], 1)
    for chunk, label in zip(torch.split(rows, size), torch.split(labels, size), strict=True):
        counted = label >= 0
        x = hidden[chunk].masked_fill(~counted[:, None], 0)  # ignored rows may hold any values, also NaN
        logits = accumulating(F.linear(x, weight, bias))
        target = label.clamp(0, len(weight) - 1).long()[:, None]
        logsumexp = logits.logsumexp(1, keepdim=True)
        losses = (logsumexp - logits.gather(1, target)).squeeze(1) * counted
        loss += losses.masked_fill(label >= len(weight), math.nan).sum()
        correct += ((logits.argmax(1) == label) & counted).sum()
        if not any(needs_grad):
            continue
        d_logits = (logits - logsumexp).exp_()
        d_logits.scatter_add_(1, target, d_logits.new_full((1, 1), -1.0).expand_as(target))
        d_logits *= counted[:, None]
        if d_bias is not None:
            d_bias += d_logits.sum(0)
        d_logits = d_logits.to(x.dtype)
        if d_hidden is not None:
            d_hidden.index_add_(0, chunk, (d_logits @ weight.to(x.dtype)).to(d_hidden.dtype))
        if d_weight is not None:
            d_weight += d_logits.mT @ x
    d_hidden, d_weight, d_bias = (
        None if d is None else d.to(x.dtype)
        for d, x in zip((d_hidden, d_weight, d_bias), (hidden, weight, bias), strict=True)
    )
    return loss, correct, (labels >= 0).sum(), d_hidden, d_weight, d_bias
