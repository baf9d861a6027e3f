"""What stands between two sub-layers: bias, dropout, residual and LayerNorm in one operation."""

from __future__ import annotations

from torch import Tensor

from bertfast import reference
from bertfast.dropout import Dropout
from bertfast.ops.choice import Implementation, check, choose


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
    choose("add_layer_norm", implementation, ("reference",))
    return reference.add_layer_norm(x, residual, bias, gamma, beta, eps, dropout)
