"""The masked-LM head's transform: GELU, then LayerNorm."""

from __future__ import annotations

from torch import Tensor

from bertfast import reference
from bertfast.ops.choice import Implementation, check, choose


def gelu_layer_norm(
    x: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float, *, implementation: Implementation | None = None
) -> Tensor:
    """LN(gelu(x + bias)): x [R, H] floating point; bias, gamma, beta [H] -> [R, H] in gamma's dtype."""
    check(
        "gelu_layer_norm",
        x=(x, "rows hidden", "floating"),
        bias=(bias, "hidden", "floating"),
        gamma=(gamma, "hidden", "floating"),
        beta=(beta, "hidden", "floating"),
    )
    choose("gelu_layer_norm", implementation, x)
    return reference.gelu_layer_norm(x, bias, gamma, beta, eps)
