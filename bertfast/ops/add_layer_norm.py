"""What stands between two sub-layers: bias, dropout, residual and LayerNorm in one operation.

Statistics and sums are fp32 at least. Measured on a CPU, beside PyTorch's own operations:

.. include:: ../../bench/results/cpu-rows/summary.md
"""

from __future__ import annotations

import torch
from torch import Tensor

from bertfast import reference
from bertfast.dropout import Dropout, kernel_arguments
from bertfast.ops.choice import Implementation, check, choose, launcher, run


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    dropout: Dropout | None = None,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """LN(residual + dropout(x + bias)) (post-norm: Vaswani et al., 2017, section 3.1).

    Args:
        x: [T, H], floating point: a product whose bias has not been added, or has if `bias` is None.
        residual: [T, H], of x's dtype or a wider one.
        bias, gamma, beta: [H].
        eps: used in fp32 (1e-12 is 0 in fp16).

    Returns:
        [T, H] in residual's dtype.
    """
    check(
        "add_layer_norm",
        dropout,
        x=(x, "tokens hidden", "floating"),
        residual=(residual, "tokens hidden", "floating"),
        bias=(bias, "hidden", "floating"),
        gamma=(gamma, "hidden", "floating"),
        beta=(beta, "hidden", "floating"),
    )
    implementation = choose("add_layer_norm", implementation, x)
    if implementation == "reference":
        return reference.add_layer_norm(x, residual, bias, gamma, beta, eps, dropout)
    return run(AddLayerNorm, implementation, x, residual, bias, gamma, beta, eps, *kernel_arguments(dropout))


class AddLayerNorm(torch.autograd.Function):
    """The kernels as one differentiable operation; dropout is drawn again in the backward pass."""

    @staticmethod
    def forward(ctx, implementation, x, residual, bias, gamma, beta, eps, *dropout):
        ctx.implementation = implementation
        forward = launcher(implementation, "add_layer_norm_forward")
        y, mean, rstd = forward(x, residual, bias, gamma, beta, eps, *dropout)
        *identity, ctx.word, ctx.threshold = dropout
        ctx.save_for_backward(x, residual, bias, gamma, beta, mean, rstd, *identity)
        return y

    @staticmethod
    def backward(ctx, d_y):
        x, residual, bias, gamma, beta, mean, rstd, *identity = ctx.saved_tensors
        d_x, d_residual, sums = launcher(ctx.implementation, "add_layer_norm_backward")(
            d_y, x, residual, bias, gamma, mean, rstd, *identity, ctx.word, ctx.threshold
        )
        d_x = d_x if d_x.shape == x.shape else d_residual
        d_gamma, d_beta, d_bias = sums
        d_bias = None if bias is None else d_bias.to(bias.dtype)
        return None, d_x, d_residual, d_bias, d_gamma.to(gamma.dtype), d_beta.to(beta.dtype), None, *[None] * 5
