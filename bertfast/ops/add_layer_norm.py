"""Bias, dropout, residual connection and LayerNorm between two sub-layers, as one operation.

Statistics and sums are at least fp32.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from bertfast.ops import reference
from bertfast.ops.arguments import Arguments, check_floating_dtype
from bertfast.ops.dispatch import Implementation, cast_sums, dtypes_reason, operator, resolve, run
from bertfast.ops.double_backward import must_be_differentiable, reference_gradients
from bertfast.ops.dropout import Dropout, as_dropout, from_kernel_arguments, kernel_arguments, row_coordinates

_ARGUMENTS = Arguments(
    "add_layer_norm",
    x="floating [tokens, hidden]",
    residual="floating [tokens, hidden]",
    bias="optional floating [hidden]",
    gamma="floating [hidden]",
    beta="optional floating [hidden]",
)


@overload
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    eps: float,
    dropout: Dropout | float | None = None,
    *,
    compute_dtype: None = None,
    implementation: Implementation | None = None,
) -> Tensor: ...
@overload
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    eps: float,
    dropout: Dropout | float | None = None,
    *,
    compute_dtype: torch.dtype | None,
    implementation: Implementation | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    eps: float,
    dropout: Dropout | float | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    implementation: Implementation | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return LN(residual + dropout(x + bias)) (post-norm: Vaswani et al., 2017, section 3.1).

    Args:
        x: [T, H], floating point: the output of a GEMM, without its bias unless `bias` is None.
        residual: [T, H], in x's dtype or a wider one.
        bias: [H]; None: no bias.
        gamma: [H].
        beta: [H]; None: a LayerNorm without bias.
        eps: ε of the LayerNorm, used in fp32 (1e-12 is 0 in fp16).
        dropout: Dropout on x + bias. A float draws a seed from torch's generator; None: no dropout.
        compute_dtype: Dtype in which the next GEMM reads the output, such as autocast's. The same kernel then also
            writes a copy in this dtype, and the backward pass adds the gradients of output and copy in registers.
        implementation: Default: the fastest one that supports the arguments.

    Returns:
        [T, H] in residual's dtype; with `compute_dtype` a pair of it and the copy [T, H], both rounded from the same
        fp32 values. If their dtypes are equal, they share memory.

    Raises:
        TypeError: An argument has an unsupported dtype.
        ValueError: Shapes or devices do not match, or `implementation` does not support the arguments.
    """
    dropout = as_dropout("add_layer_norm", dropout, lambda: row_coordinates(x), x)
    _ARGUMENTS.check(x, residual, bias, gamma, beta, dropout=dropout)
    check_floating_dtype("add_layer_norm", "compute_dtype", compute_dtype)
    copy_dtype = None if compute_dtype == residual.dtype else compute_dtype
    unsupported = dtypes_reason(implementation, x, residual, bias, gamma, beta)
    if unsupported is None and copy_dtype is not None:
        unsupported = _unsupported_copy_reason(implementation, x, copy_dtype)
    implementation = resolve("add_layer_norm", implementation, x, unsupported)
    if implementation == "reference":
        return reference.add_layer_norm(x, residual, bias, gamma, beta, eps, dropout, compute_dtype)
    paired = compute_dtype is not None and compute_dtype.itemsize == 2  # the kernels add gradients of 16-bit copies
    drop = kernel_arguments(dropout)
    output: Tensor | tuple[Tensor, Tensor] = run(
        AddLayerNorm, implementation, paired, copy_dtype, x, residual, bias, gamma, beta, eps, *drop
    )
    if compute_dtype is not None and isinstance(output, Tensor):
        return output, output
    return output


def _unsupported_copy_reason(implementation: Implementation | None, x: Tensor, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot write a copy of this dtype; None if they can."""
    on_cpu = implementation == "cpu" or (implementation is None and x.is_cpu)
    known = (torch.bfloat16,) if on_cpu else (torch.bfloat16, torch.float16)
    if dtype in known:
        return None
    names = " and ".join(str(each).removeprefix("torch.") for each in known)
    return f"its kernels write copies in {names}, got {dtype}"


class AddLayerNorm(torch.autograd.Function):
    """The kernels as a differentiable operation; the backward pass recomputes the dropout mask.

    The output is a pair if `paired`: y and its copy in `copy_dtype`, or y twice if that is None.
    """

    @staticmethod
    def forward(
        ctx: Any, implementation: Implementation, paired: bool, copy_dtype: torch.dtype | None, x: Tensor,
        residual: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor | None, eps: float, *dropout: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        ctx.implementation = implementation
        forward = operator(implementation, "add_layer_norm_forward")
        y: Tensor
        y, mean, rstd, copy = forward(x, residual, bias, gamma, beta, eps, *dropout, copy_dtype)
        *coordinates, ctx.counter_word, ctx.threshold = dropout
        ctx.eps, ctx.compute_dtype = eps, copy_dtype or residual.dtype if paired else None
        ctx.save_for_backward(x, residual, bias, gamma, beta, mean, rstd, *coordinates)
        if not paired:
            return y
        ctx.set_materialize_grads(False)  # a missing gradient is None and not a tensor of zeros
        return y, y.detach() if copy_dtype is None else copy

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, d_copy: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, residual, bias, gamma, beta, mean, rstd, seed, sequence_ids, positions = ctx.saved_tensors
        rng = (seed, sequence_ids, positions, ctx.counter_word, ctx.threshold)
        if d_y is None and d_copy is None:
            return (None,) * 14
        if must_be_differentiable():
            dropout = from_kernel_arguments(*rng)

            def definition(
                x: Tensor, residual: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor | None
            ) -> Tensor | tuple[Tensor, Tensor]:
                return reference.add_layer_norm(x, residual, bias, gamma, beta, ctx.eps, dropout, ctx.compute_dtype)

            arguments, needs_grad = (x, residual, bias, gamma, beta), ctx.needs_input_grad[3:8]
            gradients = reference_gradients(definition, arguments, needs_grad, [d_y, d_copy])
            return None, None, None, *gradients, *[None] * 6
        if d_y is None:
            d_y, d_copy = d_copy, None
        d_x, d_residual, sums = operator(ctx.implementation, "add_layer_norm_backward")(
            d_y, x, residual, bias, gamma, mean, rstd, *rng, d_copy
        )
        d_x = d_x if d_x.shape == x.shape else d_residual
        d_gamma, d_beta, d_bias = cast_sums(sums, gamma, beta, bias)
        return None, None, None, d_x, d_residual, d_bias, d_gamma, d_beta, *[None] * 6
