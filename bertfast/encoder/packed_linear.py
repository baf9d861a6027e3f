"""`PackedLinear`: a linear layer of a frozen model, whose weight is packed for the CPU's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bertfast.ops.packed_linear import PackedActivation, PackedWeight, packed_linear
from bertfast.runtime.torch_compat import is_jit_tracing

PACKED_ACTIVATIONS: dict[str, PackedActivation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""The activations that the kernels apply to a linear layer's sums, by their names in a configuration."""

# Names of the entries that a quantised layer has in a model's state.
INT8_VALUES, INT8_SCALES, INT8_FACTORS = "weight_int8", "weight_scale", "input_factors"

FROZEN = "this model is frozen for inference: load it again to train or change it"


class PackedLinear(nn.Module):
    """Compute x W^T + bias with a packed weight, in inference only.

    Its state is that of a `torch.nn.Linear`. A quantised one has int8 values as `weight_int8` instead of `weight`, so
    that no other layer takes them for weights, and `weight_scale` and `input_factors` besides.

    Args:
        packed: The weight.
        group: A weight that `packed` is a part of, which other layers of the same input share; None: none.
        first: The row of `group` with which `packed` begins.
        dtype: Dtype of the weight before it was packed, in which it is saved; None: that of the packed one.
    """

    def __init__(
        self,
        packed: PackedWeight,
        group: PackedWeight | None = None,
        first: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.packed = packed
        self.group, self.first = group, first
        is_floating = packed.operands.is_floating_point()
        self.dtype = dtype or (packed.operands.dtype if is_floating else torch.float32)
        self.in_features, self.out_features = packed.depth, packed.columns
        self.training = False

    def forward(self, x: Tensor, activation: PackedActivation = "none", dtype: torch.dtype | None = None) -> Tensor:
        """Return activation(x W^T + bias): [..., K] -> [..., N] in `dtype`, or that of x."""
        require_no_gradient(x)
        makes_graph = torch.compiler.is_exporting() if torch.compiler.is_compiling() else is_jit_tracing()
        if makes_graph:
            raise RuntimeError("this model is frozen for inference: trace or export it before it is frozen")
        y = packed_linear(x.reshape(-1, self.in_features), self.packed, activation, dtype=dtype)
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:
        """A copy of W [N, K], in fp32 or bf16; that of an int8 weight has its rounding errors."""
        return self.packed.dequantised()

    @property
    def is_int8(self) -> bool:
        """Whether the weight is quantised."""
        return self.packed.operands.dtype == torch.int8

    @property
    def bias(self) -> Tensor | None:
        """The bias [N]; None: there is none."""
        return self.packed.bias if len(self.packed.bias) else None

    def train(self, mode: bool = True) -> PackedLinear:
        """Refuse training mode."""
        if mode:
            raise RuntimeError(FROZEN)
        return self

    def extra_repr(self) -> str:
        """Return sizes and dtype of the weight."""
        dtype = str(self.packed.operands.dtype).removeprefix("torch.")
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        require_unchanged(fn, self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A pickle would store the whole group once more with each of its parts.
        state = self.__dict__.copy()
        if self.group is not None:
            del state["packed"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.group is not None:
            self.packed = self.group.rows(self.first, self.first + self.out_features)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        packed = self.packed
        values = packed.unpacked()
        destination[f"{prefix}{INT8_VALUES if self.is_int8 else 'weight'}"] = (
            values if self.is_int8 else values.to(self.dtype)
        )
        state = {"bias": packed.bias, INT8_SCALES: packed.scales, INT8_FACTORS: packed.factors}
        if self.is_int8 and not len(packed.factors):  # so that a file without them is known to be damaged
            state[INT8_FACTORS] = torch.ones(packed.depth)
        # Copies, as layers of the same input share memory, which is refused where they are saved.
        destination.update({prefix + name: tensor.clone() for name, tensor in state.items() if len(tensor)})

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        raise RuntimeError(FROZEN)


def require_no_gradient(x: Tensor) -> None:
    """Raise RuntimeError if the gradient of a packed linear layer's input would be required."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(FROZEN)


def is_frozen(model: nn.Module) -> bool:
    """Return whether weights of a model are packed."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def frozen_precision(model: nn.Module) -> str:
    """Return the precision of a frozen model's packed weights: int8 if it is quantised, else fp32 or bf16, or both."""
    dtypes = {module.packed.operands.dtype for module in model.modules() if isinstance(module, PackedLinear)}
    if torch.int8 in dtypes:
        return "int8"
    return " and ".join(sorted("bf16" if dtype == torch.bfloat16 else "fp32" for dtype in dtypes))


def has_int8(model: nn.Module) -> bool:
    """Return whether a model has quantised layers."""
    return any(isinstance(module, PackedLinear) and module.is_int8 for module in model.modules())


def has_onednn_weights(model: nn.Module) -> bool:
    """Return whether a model has packed weights that oneDNN multiplies by many tokens."""
    return any(isinstance(module, PackedLinear) and len(module.packed.dense) for module in model.modules())


def require_unchanged(fn: Callable[[Tensor], Tensor], model: nn.Module) -> None:
    """Raise RuntimeError if a conversion of tensors changes the dtype or the device of those of a frozen model."""
    dtypes = {module.dtype for module in model.modules() if isinstance(module, PackedLinear)}
    dtypes |= {x.dtype for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()}
    for dtype in dtypes:
        before = torch.empty(0, dtype=dtype)
        after = fn(before)
        if (after.dtype, after.device) != (before.dtype, before.device):
            raise RuntimeError(FROZEN)
