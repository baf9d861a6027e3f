"""The residual connection before a sub-layer, and the norm that the sub-layer reads, as one operation.

Pre-norm (Xiong et al., 2020) keeps the residual stream and normalises a copy of it, by LayerNorm (Ba et al., 2016) or
RMSNorm (Zhang and Sennrich, 2019). The statistics are those of the stream as it is stored, so the backward pass reads
neither x nor the residual. Statistics and sums are at least fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bertfast.ops import reference
from bertfast.ops.arguments import Arguments, check_floating_dtype
from bertfast.ops.dispatch import Implementation, cast_sums, dtypes_reason, operator, resolve, run
from bertfast.ops.double_backward import must_be_differentiable, reference_gradients
from bertfast.ops.dropout import Dropout, as_dropout, from_kernel_arguments, kernel_arguments, row_coordinates
from bertfast.ops.reference_parts import accumulating, drop_hidden

_ARGUMENTS = Arguments(
    "pre_norm",
    x="optional floating [tokens, hidden]",
    residual="floating [tokens, hidden]",
    bias="optional floating [hidden]",
    gamma="floating [hidden]",
    beta="optional floating [hidden]",
)


def pre_norm(
    x: Tensor | None,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    eps: float,
    dropout: Dropout | float | None = None,
    *,
    rms: bool = False,
    norm_dtype: torch.dtype | None = None,
    implementation: Implementation | None = None,
) -> tuple[Tensor, Tensor]:
    """Return stream = residual + dropout(x + bias) and its norm, LayerNorm(stream) or RMSNorm(stream).

    Args:
        x: [T, H], floating point: the output of a GEMM, without its bias unless `bias` is None. None: nothing is added,
            the stream is `residual` itself, and only the norm is computed.
        residual: [T, H], floating point.
        bias: [H]; None: no bias.
        gamma: [H], weight of the norm.
        beta: [H], bias of the LayerNorm; None: no bias. RMSNorm has none.
        eps: ε of the norm, used in fp32.
        dropout: Dropout on x + bias. A float draws a seed from torch's generator; None: no dropout.
        rms: Compute the RMSNorm stream / sqrt(mean(stream²) + eps) · gamma, without mean and beta.
        norm_dtype: Dtype of the normalised stream, such as autocast's; None: residual's.
        implementation: Default: the fastest one that supports the arguments.

    Returns:
        The stream [T, H] in residual's dtype, and its norm [T, H] in `norm_dtype`.

    Raises:
        TypeError: An argument has an unsupported dtype.
        ValueError: Shapes or devices do not match, an argument has no effect (bias or dropout without x, beta with
            `rms`), or `implementation` does not support the arguments.
    """
    _check_effect(x, bias, beta, dropout, rms)
    dropout = as_dropout("pre_norm", dropout, lambda: row_coordinates(residual), residual)
    _ARGUMENTS.check(x, residual, bias, gamma, beta, dropout=dropout)
    check_floating_dtype("pre_norm", "norm_dtype", norm_dtype)
    norm_dtype = norm_dtype or residual.dtype
    unsupported = dtypes_reason(implementation, residual, x, bias, gamma, beta, norm_dtype)
    implementation = resolve("pre_norm", implementation, residual, unsupported)
    if implementation == "reference":
        return reference.pre_norm(x, residual, bias, gamma, beta, eps, dropout, rms, norm_dtype)
    drop = kernel_arguments(dropout)
    output: Tensor | tuple[Tensor, Tensor] = run(
        PreNorm, implementation, x, residual, bias, gamma, beta, eps, rms, norm_dtype, *drop
    )
    return (residual, output) if isinstance(output, Tensor) else output


def _check_effect(
    x: Tensor | None, bias: Tensor | None, beta: Tensor | None, dropout: Dropout | float | None, rms: bool
) -> None:
    """Refuse arguments that would have no effect."""
    for name, argument in (("bias", bias), ("dropout", dropout or None)):
        if x is None and argument is not None:
            raise ValueError(f"pre_norm: {name} applies to x, which is None: pass {name}=None")
    if rms and beta is not None:
        raise ValueError("pre_norm: an RMSNorm has no beta: pass beta=None, or rms=False for a LayerNorm")


class PreNorm(torch.autograd.Function):
    """The kernels as a differentiable operation; the backward pass recomputes the dropout mask.

    The output is the pair of stream and norm, or without x the norm alone.
    """

    @staticmethod
    def forward(
        ctx: Any, implementation: Implementation, x: Tensor | None, residual: Tensor, bias: Tensor | None,
        gamma: Tensor, beta: Tensor | None, eps: float, rms: bool, norm_dtype: torch.dtype, *dropout: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        stream: Tensor
        normed: Tensor
        stream, normed, mean, rstd = operator(implementation, "pre_norm_forward")(
            residual, x, bias, gamma, beta, eps, rms, norm_dtype, *dropout
        )
        stream = residual if x is None else stream
        ctx.implementation, ctx.eps, ctx.rms, ctx.norm_dtype = implementation, eps, rms, norm_dtype
        ctx.x_dtype, ctx.bias_dtype = (None if tensor is None else tensor.dtype for tensor in (x, bias))
        *coordinates, ctx.counter_word, ctx.threshold = dropout
        ctx.save_for_backward(stream, gamma, beta, mean, rstd, *coordinates)
        if x is None:
            return normed
        ctx.set_materialize_grads(False)  # a missing gradient is None and not a tensor of zeros
        return stream, normed

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        d_stream, d_normed = d_outputs if len(d_outputs) == 2 else (None, d_outputs[0])
        if d_stream is None and d_normed is None:
            return (None,) * 14
        if must_be_differentiable():
            return None, *_differentiable_gradients(ctx, d_stream, d_normed), *[None] * 8
        stream, gamma, beta, mean, rstd, *coordinates = ctx.saved_tensors
        rng = (*coordinates, ctx.counter_word, ctx.threshold)
        d_x, d_residual, sums = operator(ctx.implementation, "pre_norm_backward")(
            stream, d_stream, d_normed, gamma, mean, rstd, ctx.rms, ctx.bias_dtype is not None, ctx.x_dtype, *rng
        )
        if ctx.x_dtype is None:
            d_x = None
        elif d_x.shape != stream.shape:
            d_x = d_residual
        d_gamma, d_beta, d_bias = cast_sums(sums, gamma, beta, ctx.bias_dtype)
        return None, d_x, d_residual, d_bias, d_gamma, d_beta, *[None] * 8


def _differentiable_gradients(
    ctx: Any, d_stream: Tensor | None, d_normed: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of (x, residual, bias, gamma, beta) by operations that can be differentiated.

    The saved stream is an output of the operation, so derivatives with respect to it reach x and residual by a second
    call of the operation's backward pass.
    """
    stream, gamma, beta, _mean, _rstd, seed, sequence_ids, positions = ctx.saved_tensors
    total, d_gamma, d_beta = d_stream, None, None
    if d_normed is not None:

        def definition(stream: Tensor, gamma: Tensor, beta: Tensor | None) -> Tensor:
            return reference.pre_norm(None, stream, None, gamma, beta, ctx.eps, None, ctx.rms, ctx.norm_dtype)[1]

        needs_grad = (stream.requires_grad, *ctx.needs_input_grad[4:6])
        through_norm, d_gamma, d_beta = reference_gradients(definition, (stream, gamma, beta), needs_grad, [d_normed])
        if through_norm is not None:
            total = through_norm if d_stream is None else d_stream + through_norm
    if total is None or ctx.x_dtype is None:
        return None, total, None, d_gamma, d_beta
    dropout = from_kernel_arguments(seed, sequence_ids, positions, ctx.counter_word, ctx.threshold)
    dropped = drop_hidden(accumulating(total), dropout)
    d_bias = None if ctx.bias_dtype is None else dropped.sum(0).to(ctx.bias_dtype)
    return dropped.to(ctx.x_dtype), total, d_bias, d_gamma, d_beta
