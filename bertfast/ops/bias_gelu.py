"""The activation of the feed-forward layer (Hendrycks and Gimpel, 2016), after a bias or after a GEMM with a bias.

Sums are at least fp32.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from bertfast.ops import reference
from bertfast.ops.arguments import Arguments
from bertfast.ops.dispatch import Implementation, dtypes_reason, gemm_dtype, operator, resolve, run
from bertfast.ops.double_backward import must_be_differentiable, reference_gradients
from bertfast.ops.matmul import linear

Approximate = Literal["none", "tanh"]
"""The exact GELU of BERT, x · Φ(x), or its tanh approximation."""

# (GEMM dtype, hidden, columns) for which one Triton kernel is faster than the library's GEMM and `bias_gelu`, as a file
# in bench/results shows. None has been measured yet.
_FUSED: set[tuple[torch.dtype, int, int]] = set()

_BIAS_GELU = Arguments("bias_gelu", x="floating [tokens, columns]", bias="floating [columns]")
_LINEAR_GELU = Arguments(
    "linear_gelu", x="floating [tokens, hidden]", weight="floating [columns, hidden]", bias="floating [columns]"
)


def bias_gelu(
    x: Tensor, bias: Tensor, approximate: Approximate = "none", *, implementation: Implementation | None = None
) -> Tensor:
    """Return gelu(x + bias).

    Args:
        x: [T, columns], floating point: the output of a GEMM without its bias.
        bias: [columns].
        approximate: "none" or "tanh", as in `torch.nn.functional.gelu`.
        implementation: Default: the fastest one that supports the arguments.

    Returns:
        [T, columns] in x's dtype.

    Raises:
        TypeError: An argument has an unsupported dtype.
        ValueError: Shapes or devices do not match, or `implementation` does not support the arguments.
    """
    _BIAS_GELU.check(x, bias)
    _check_approximate("bias_gelu", approximate)
    implementation = resolve("bias_gelu", implementation, x, dtypes_reason(implementation, x, bias))
    if implementation == "reference":
        return reference.bias_gelu(x, bias, approximate)
    y: Tensor = run(BiasGelu, implementation, x, bias, approximate)
    return y


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    approximate: Approximate = "none",
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """Return gelu(x W^T + bias); autocast applies to the GEMM.

    Args:
        x: [T, H], floating point.
        weight: [columns, H].
        bias: [columns].
        approximate: "none" or "tanh", as in `torch.nn.functional.gelu`.
        implementation: Default: the fastest one that supports the arguments.

    Returns:
        [T, columns] in the dtype of the GEMM.

    Raises:
        TypeError: An argument has an unsupported dtype.
        ValueError: Shapes or devices do not match, or `implementation` does not support the arguments.
    """
    _LINEAR_GELU.check(x, weight, bias)
    _check_approximate("linear_gelu", approximate)
    resolved = resolve("bias_gelu", implementation, x)
    if resolved == "reference":
        return reference.linear_gelu(x, weight, bias, approximate)
    dtype = gemm_dtype(x, weight)
    if resolved == "triton" and (dtype, *weight.mT.shape) in _FUSED:
        y: Tensor = run(LinearGelu, x.to(dtype), weight.to(dtype), bias, approximate)
        return y
    # The GEMM's output may have another dtype than x, which another implementation supports.
    return bias_gelu(linear(x, weight), bias, approximate, implementation=implementation)


class BiasGelu(torch.autograd.Function):
    """The kernels as a differentiable operation."""

    @staticmethod
    def forward(ctx: Any, implementation: Implementation, x: Tensor, bias: Tensor, approximate: Approximate) -> Tensor:
        ctx.implementation, ctx.approximate = implementation, approximate
        ctx.save_for_backward(x, bias)
        y: Tensor = operator(implementation, "bias_gelu_forward")(x, bias, approximate)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        if must_be_differentiable():
            arguments = (x, bias, ctx.approximate)
            return None, *reference_gradients(reference.bias_gelu, arguments, ctx.needs_input_grad[1:], [d_y])
        d_x, d_bias = operator(ctx.implementation, "bias_gelu_backward")(d_y, x, bias, ctx.approximate)
        return None, d_x, d_bias.to(bias.dtype), None


class LinearGelu(torch.autograd.Function):
    """The GEMM with GELU as its epilogue in one kernel; the backward pass is that of `BiasGelu` and two GEMMs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, approximate: Approximate) -> Tensor:
        y: Tensor
        y, gemm = operator("triton", "linear_gelu_forward")(x, weight, bias, approximate)
        ctx.approximate = approximate
        ctx.save_for_backward(x, weight, bias, gemm)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, gemm = ctx.saved_tensors
        if must_be_differentiable():
            arguments = (x, weight, bias, ctx.approximate)
            return tuple(reference_gradients(reference.linear_gelu, arguments, ctx.needs_input_grad, [d_y]))
        d_gemm, d_bias = operator("triton", "bias_gelu_backward")(d_y, gemm, bias, ctx.approximate)
        d_x = d_gemm @ weight if ctx.needs_input_grad[0] else None
        d_weight = d_gemm.mT @ x if ctx.needs_input_grad[1] else None
        return d_x, d_weight, d_bias.to(bias.dtype), None


def _check_approximate(operation: str, approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{operation}: approximate must be 'none' or 'tanh', got {approximate!r}")
