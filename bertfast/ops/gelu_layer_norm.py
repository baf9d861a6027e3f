"""The transform of the masked-LM head: GELU, then LayerNorm. Statistics and sums are at least fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bertfast.ops import reference
from bertfast.ops.arguments import Arguments
from bertfast.ops.dispatch import Implementation, cast_sums, dtypes_reason, operator, resolve, run
from bertfast.ops.double_backward import must_be_differentiable, reference_gradients

_ARGUMENTS = Arguments(
    "gelu_layer_norm",
    x="floating [rows, hidden]",
    bias="optional floating [hidden]",
    gamma="floating [hidden]",
    beta="optional floating [hidden]",
)


def gelu_layer_norm(
    x: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    eps: float,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """Return LN(gelu(x + bias)) with the exact GELU.

    Args:
        x: [R, H], floating point: the output of a GEMM, without its bias unless `bias` is None.
        bias: [H]; None: no bias.
        gamma: [H].
        beta: [H]; None: a LayerNorm without bias.
        eps: ε of the LayerNorm, used in fp32.
        implementation: Default: the fastest one that supports the arguments.

    Returns:
        [R, H] in gamma's dtype.

    Raises:
        TypeError: An argument has an unsupported dtype.
        ValueError: Shapes or devices do not match, or `implementation` does not support the arguments.
    """
    _ARGUMENTS.check(x, bias, gamma, beta)
    unsupported = dtypes_reason(implementation, x, bias, gamma, beta)
    implementation = resolve("gelu_layer_norm", implementation, x, unsupported)
    if implementation == "reference":
        return reference.gelu_layer_norm(x, bias, gamma, beta, eps)
    y: Tensor = run(GeluLayerNorm, implementation, x, bias, gamma, beta, eps)
    return y


class GeluLayerNorm(torch.autograd.Function):
    """The kernels as a differentiable operation."""

    @staticmethod
    def forward(
        ctx: Any, implementation: Implementation, x: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor | None,
        eps: float,
    ) -> Tensor:  # fmt: skip
        ctx.implementation, ctx.eps = implementation, eps
        y: Tensor
        y, mean, rstd = operator(implementation, "gelu_layer_norm_forward")(x, bias, gamma, beta, eps)
        ctx.save_for_backward(x, bias, gamma, beta, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, gamma, beta, mean, rstd = ctx.saved_tensors
        if must_be_differentiable():
            arguments = (x, bias, gamma, beta, ctx.eps)
            return None, *reference_gradients(reference.gelu_layer_norm, arguments, ctx.needs_input_grad[1:], [d_y])
        d_x, sums = operator(ctx.implementation, "gelu_layer_norm_backward")(d_y, x, bias, gamma, mean, rstd)
        d_gamma, d_beta, d_bias = cast_sums(sums, gamma, beta, bias)
        return None, d_x, d_bias, d_gamma, d_beta, None
