"""The feed-forward layer's activation (Hendrycks and Gimpel, 2016), after a bias or after a whole product."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from bertfast import reference
from bertfast.ops.choice import Implementation, check, choose

Approximate = Literal["none", "tanh"]
"""The exact GELU of BERT, x · Φ(x), or the tanh formula."""


def bias_gelu(
    x: Tensor, bias: Tensor, approximate: Approximate = "none", *, implementation: Implementation | None = None
) -> Tensor:
    """gelu(x + bias): x [T, columns] floating point, bias [columns] -> [T, columns] in x's dtype."""
    check("bias_gelu", x=(x, "tokens columns", "floating"), bias=(bias, "columns", "floating"))
    _check_approximate("bias_gelu", approximate)
    choose("bias_gelu", implementation, x)
    return reference.bias_gelu(x, bias, approximate)


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    approximate: Approximate = "none",
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """gelu(x W^T + bias): x [T, H], weight [columns, H], bias [columns] -> [T, columns], autocast as a product."""
    check(
        "linear_gelu",
        x=(x, "tokens hidden", "floating"),
        weight=(weight, "columns hidden", "floating"),
        bias=(bias, "columns", "floating"),
    )
    _check_approximate("linear_gelu", approximate)
    choose("linear_gelu", implementation, x)
    return reference.linear_gelu(x, weight, bias, approximate)


def _check_approximate(operation: str, approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{operation}: approximate must be 'none' or 'tanh', got {approximate!r}")
