"""The feed-forward layer but for its last linear layer, on packed tokens, for any model family.

T tokens, H hidden, I intermediate columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertfast import ops
from bertfast.encoder.linear import apply_linear, concatenated, is_plain
from bertfast.encoder.packed_linear import PACKED_ACTIVATIONS, PackedLinear
from bertfast.encoder.parts import LayerParts
from bertfast.ops import matmul

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")
"""The activations of feed-forward layers that run packed, by their names in a configuration."""

_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh")
_PLAIN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
_GATED: dict[str, Literal["gelu", "gelu_tanh", "silu"]] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def intermediate(parts: LayerParts, x: Tensor) -> Tensor:
    """Compute the activated columns of a feed-forward layer: [T, H] -> [T, I]."""
    if parts.gated:
        return _gated(parts.intermediate, x, parts.activation)
    return activate(parts.intermediate[0], x, parts.activation)


def activate(dense: nn.Module, x: Tensor, activation: str) -> Tensor:
    """Compute activation(dense(x)), in one operation where it is a GELU of a plain linear layer."""
    approximate: Literal["tanh", "none"] = "tanh" if activation in _TANH_GELUS else "none"
    if activation in _PLAIN_ACTIVATIONS:
        return _PLAIN_ACTIVATIONS[activation](apply_linear(dense, x))
    if isinstance(dense, PackedLinear):
        return cast(Tensor, dense(x, PACKED_ACTIVATIONS[activation]))
    if is_plain(dense) and dense.bias is not None:
        return ops.linear_gelu(x, dense.weight, dense.bias, approximate)
    return F.gelu(apply_linear(dense, x), approximate=approximate)


def _gated(modules: tuple[nn.Module, ...], x: Tensor, activation: str) -> Tensor:
    """Compute activation(a) · b, where a and b are the halves of the modules' output (GLU variants: Shazeer, 2020)."""
    if activation not in _GATED:
        activated, factor = concatenated(modules, x).chunk(2, dim=1)
        return _PLAIN_ACTIVATIONS[activation](activated) * factor
    dense = modules[0]
    if len(modules) == 1 and is_plain(dense):
        return ops.gated_activation(matmul.linear(x, dense.weight), _GATED[activation], dense.bias)
    return ops.gated_activation(concatenated(modules, x), _GATED[activation])
