"""The feed-forward layer's activation (Hendrycks and Gimpel, 2016), after a bias or after a whole product.

Statistics and sums are fp32 at least. Measured on a CPU, beside PyTorch's own operations:

.. include:: ../../bench/results/cpu-rows/summary.md
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bertfast.ops import reference
from bertfast.ops.arguments import Arguments
from bertfast.ops.dispatch import Implementation, float64_reason, gemm_dtype, operator, resolve, run
from bertfast.ops.double_backward import must_be_differentiable, reference_gradients
from bertfast.ops.matmul import linear

Approximate = Literal["none", "tanh"]
"""The exact GELU of BERT, x · Φ(x), or the tanh formula."""

# (dtype of the product, hidden, columns) where one Triton kernel beats the library's product and `bias_gelu`: what a
# file in bench/results shows to be so, and nothing has been measured yet.
_FUSED: set[tuple[torch.dtype, int, int]] = set()

_BIAS_GELU = Arguments("bias_gelu", x="floating [tokens, columns]", bias="floating [columns]")
_LINEAR_GELU = Arguments(
    "linear_gelu", x="floating [tokens, hidden]", weight="floating [columns, hidden]", bias="floating [columns]"
)


def bias_gelu(
    x: Tensor, bias: Tensor, approximate: Approximate = "none", *, implementation: Implementation | None = None
) -> Tensor:
    """gelu(x + bias): x [T, columns] floating point, bias [columns] -> [T, columns] in x's dtype."""
    _BIAS_GELU.check(x, bias)
    _check_approximate("bias_gelu", approximate)
    implementation = resolve("bias_gelu", implementation, x, float64_reason(bias))
    if implementation == "reference":
        return reference.bias_gelu(x, bias, approximate)
    return run(BiasGelu, implementation, x, bias, approximate)


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    approximate: Approximate = "none",
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """gelu(x W^T + bias): x [T, H], weight [columns, H], bias [columns] -> [T, columns], autocast as a product."""
    _LINEAR_GELU.check(x, weight, bias)
    _check_approximate("linear_gelu", approximate)
    chosen = resolve("bias_gelu", implementation, x)
    if chosen == "reference":
        return reference.linear_gelu(x, weight, bias, approximate)
    dtype = gemm_dtype(x, weight)
    if chosen == "triton" and (dtype, *weight.mT.shape) in _FUSED:
        return run(LinearGelu, x.to(dtype), weight.to(dtype), bias, approximate)
    # The product may be of another dtype than x, for which the choice is another.
    return bias_gelu(linear(x, weight), bias, approximate, implementation=implementation)


class BiasGelu(torch.autograd.Function):
    """The kernels as one differentiable operation."""

    @staticmethod
    def forward(ctx, implementation, x, bias, approximate):
        ctx.implementation, ctx.approximate = implementation, approximate
        ctx.save_for_backward(x, bias)
        return operator(implementation, "bias_gelu_forward")(x, bias, approximate)

    @staticmethod
    def backward(ctx, d_y):
        x, bias = ctx.saved_tensors
        if must_be_differentiable():
            arguments = (x, bias, ctx.approximate)
            return None, *reference_gradients(reference.bias_gelu, arguments, ctx.needs_input_grad[1:], [d_y])
        d_x, d_bias = operator(ctx.implementation, "bias_gelu_backward")(d_y, x, bias, ctx.approximate)
        return None, d_x, d_bias.to(bias.dtype), None


class LinearGelu(torch.autograd.Function):
    """The product with its GELU in one kernel; its gradient is that of `BiasGelu` and two products."""

    @staticmethod
    def forward(ctx, x, weight, bias, approximate):
        y, product = operator("triton", "linear_gelu_forward")(x, weight, bias, approximate)
        ctx.approximate = approximate
        ctx.save_for_backward(x, weight, bias, product)
        return y

    @staticmethod
    def backward(ctx, d_y):
        x, weight, bias, product = ctx.saved_tensors
        if must_be_differentiable():
            arguments = (x, weight, bias, ctx.approximate)
            return tuple(reference_gradients(reference.linear_gelu, arguments, ctx.needs_input_grad, [d_y]))
        d_product, d_bias = operator("triton", "bias_gelu_backward")(d_y, product, bias, ctx.approximate)
        d_x = d_product @ weight if ctx.needs_input_grad[0] else None
        d_weight = d_product.mT @ x if ctx.needs_input_grad[1] else None
        return d_x, d_weight, d_bias.to(bias.dtype), None


def _check_approximate(operation: str, approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{operation}: approximate must be 'none' or 'tanh', got {approximate!r}")
