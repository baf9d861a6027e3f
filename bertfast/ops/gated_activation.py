"""The gated activation of feed-forward layers: GeGLU and SwiGLU (Shazeer, 2020). Sums are at least fp32."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bertfast.ops import reference
from bertfast.ops.arguments import Arguments
from bertfast.ops.dispatch import Implementation, dtypes_reason, operator, resolve, run
from bertfast.ops.double_backward import must_be_differentiable, reference_gradients

Activation = Literal["gelu", "gelu_tanh", "silu"]
"""The exact GELU, x · Φ(x), its tanh approximation, or SiLU, x · sigmoid(x)."""

_ARGUMENTS = Arguments("gated_activation", x="floating [tokens, columns]", bias="optional floating [columns]")


def gated_activation(
    x: Tensor, activation: Activation, bias: Tensor | None = None, *, implementation: Implementation | None = None
) -> Tensor:
    """Return act(x[:, :I] + bias[:I]) · (x[:, I:] + bias[I:]).

    Args:
        x: [T, 2 I], floating point: the output of one GEMM, without its bias unless `bias` is None. The first half of
            the columns is activated, and the second half multiplies it.
        activation: "gelu" (exact) or "gelu_tanh" for GeGLU, "silu" for SwiGLU.
        bias: [2 I]; None: no bias.
        implementation: Default: the fastest one that supports the arguments.

    Returns:
        [T, I] in x's dtype.

    Raises:
        TypeError: An argument has an unsupported dtype.
        ValueError: Shapes or devices do not match, the number of columns is odd, `activation` is unknown, or
            `implementation` does not support the arguments.
    """
    _ARGUMENTS.check(x, bias)
    if x.shape[1] % 2:
        raise ValueError(f"gated_activation: x must have an even number of columns, two halves, got {list(x.shape)}")
    if activation not in get_args(Activation):
        known = ", ".join(map(repr, get_args(Activation)))
        raise ValueError(f"gated_activation: activation must be one of {known}, got {activation!r}")
    implementation = resolve("gated_activation", implementation, x, dtypes_reason(implementation, x, bias))
    if implementation == "reference":
        return reference.gated_activation(x, bias, activation)
    y: Tensor = run(GatedActivation, implementation, x, bias, activation)
    return y


class GatedActivation(torch.autograd.Function):
    """The kernels as a differentiable operation; the backward pass recomputes the activation from x."""

    @staticmethod
    def forward(
        ctx: Any, implementation: Implementation, x: Tensor, bias: Tensor | None, activation: Activation
    ) -> Tensor:
        ctx.implementation, ctx.activation = implementation, activation
        ctx.save_for_backward(x, bias)
        y: Tensor = operator(implementation, "gated_activation_forward")(x, bias, activation)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        if must_be_differentiable():
            arguments = (x, bias, ctx.activation)
            return None, *reference_gradients(reference.gated_activation, arguments, ctx.needs_input_grad[1:], [d_y])
        d_x, d_bias = operator(ctx.implementation, "gated_activation_backward")(d_y, x, bias, ctx.activation)
        return None, d_x, None if bias is None else d_bias.to(bias.dtype), None
