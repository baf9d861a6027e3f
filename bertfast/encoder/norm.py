"""Residual sums and norms of packed tokens: LayerNorm, and RMSNorm where a family has it.

T tokens, H hidden, K columns that a projection reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bertfast import ops
from bertfast.encoder.linear import is_plain
from bertfast.ops import matmul
from bertfast.ops.dropout import Dropout


def add_norm(
    dense: nn.Module,
    norm: nn.Module,
    x: Tensor,
    residual: Tensor,
    dropout: Dropout | None,
    compute_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Compute norm(residual + dropout(dense(x))), the end of a half of a post-norm layer.

    Args:
        dense: The projection, [T, K] -> [T, H].
        norm: A LayerNorm.
        x: [T, K].
        residual: [T, H].
        dropout: Dropout on the projection; None: no dropout.
        compute_dtype: Dtype of a copy of the result; None: no copy.

    Returns:
        The result [T, H] in residual's dtype, and its copy.
    """
    projected, bias = project(dense, x)
    gamma, beta, eps, _ = _norm_arguments(norm)
    output = ops.add_layer_norm(projected, residual, bias, gamma, beta, eps, dropout, compute_dtype=compute_dtype)
    return output if isinstance(output, tuple) else (output, None)


def add_pre_norm(
    dense: nn.Module,
    norm: nn.Module,
    x: Tensor,
    residual: Tensor,
    dropout: Dropout | None,
    compute_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Compute the stream, residual + dropout(dense(x)), and its norm, between the halves of a pre-norm layer.

    Args:
        dense: The projection, [T, K] -> [T, H].
        norm: A LayerNorm or an RMSNorm.
        x: [T, K].
        residual: [T, H].
        dropout: Dropout on the projection; None: no dropout.
        compute_dtype: Dtype of the norm; None: that of the stream.

    Returns:
        The stream [T, H] in residual's dtype, and its norm.
    """
    projected, bias = project(dense, x)
    gamma, beta, eps, rms = _norm_arguments(norm)
    return ops.pre_norm(projected, residual, bias, gamma, beta, eps, dropout, rms=rms, norm_dtype=compute_dtype)


def normalise(norm: nn.Module, x: Tensor, compute_dtype: torch.dtype | None = None) -> Tensor:
    """Compute the norm of x [T, H], in `compute_dtype` or that of x; an Identity returns x as it is."""
    if isinstance(norm, nn.Identity):
        return x
    gamma, beta, eps, rms = _norm_arguments(norm)
    return ops.pre_norm(None, x, None, gamma, beta, eps, rms=rms, norm_dtype=compute_dtype)[1]


def project(dense: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Compute a projection without its bias, which is returned for the next operation; None: it is added already."""
    return (matmul.linear(x, dense.weight), dense.bias) if is_plain(dense) else (dense(x), None)


def _norm_arguments(norm: Any) -> tuple[Tensor, Tensor | None, float, bool]:
    """Return weight, bias and ε of a norm, and whether it is an RMSNorm."""
    if isinstance(norm, nn.LayerNorm):
        return norm.weight, norm.bias, norm.eps, False
    return norm.weight, None, norm.variance_epsilon, True
