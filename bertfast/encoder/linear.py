"""Linear layers: when their parameters may be read instead of calling them, and several computed at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from bertfast.encoder.packed_linear import PackedLinear, require_no_gradient
from bertfast.ops import matmul
from bertfast.ops.packed_linear import PackedWeight, packed_linear
from bertfast.runtime.torch_compat import autocast_dtype, is_sharded, module_hooks, unsharded_class


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a module is a plain linear layer, whose `weight` and `bias` can be read instead of calling it.

    A LoRA-wrapped, quantised, parametrised or hooked layer is of another type, or has hooks, and must be called.
    """
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and (module.bias is None or type(module.bias) is nn.Parameter)
        and not is_watched(module)
    )


def is_linear(module: nn.Module) -> bool:
    """Return what `is_plain` returns once FSDP2 has gathered sharded parameters for the module around them."""
    if unsharded_class(type(module)) is not nn.Linear or (is_watched(module) and not is_sharded(module)):
        return False
    kinds = {type(module.weight), type(module.bias)} - {nn.Parameter, type(None)}
    # DTensor is recognised by its module's name, since importing it is slow.
    return all(kind.__module__.startswith("torch.distributed.tensor") for kind in kinds)


def is_watched(module: nn.Module) -> bool:
    """Return whether calling the module does more than its class says: it has hooks, or a `forward` of its own."""
    return any(module_hooks(module)) or "forward" in vars(module)


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """Compute a linear layer of x [N, K], by the faster GEMM if it is plain and by calling it otherwise."""
    if is_plain(module):
        return matmul.linear(x, module.weight, module.bias)
    y: Tensor = module(x)
    return y


def concatenated(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Compute linear layers of the same input, in one GEMM where that is faster.

    Args:
        modules: Linear layers; those that are not plain are called.
        x: [T, H].

    Returns:
        Their outputs side by side, [T, columns of all]; those of packed weights in their `compute_dtype`.

    Raises:
        RuntimeError: x requires a gradient, and the weights are packed.
    """
    group = common_group(modules)
    if group is not None:
        require_no_gradient(x)
        return packed_linear(x, group, dtype=group.compute_dtype)
    plain = [module for module in modules if is_plain(module)]
    has_biases = {module.bias is not None for module in plain}
    if len(modules) > 1 and len(plain) == len(modules) and len(has_biases) == 1:
        return _at_once(plain, x)
    outputs = [apply_linear(module, x) for module in modules]
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]


def _at_once(linears: list[nn.Linear], x: Tensor) -> Tensor:
    """Compute plain linear layers, all or none of which have a bias."""
    rows = [linear.out_features for linear in linears]
    compiling = torch.compiler.is_compiling()
    # One tensor of all requires a copy of the weights or of the results: copy the smaller of the two. In half
    # precision several GEMMs round differently from the single one that a compiler is given.
    copy_results = not compiling and x.dtype == torch.float32 and len(x) < linears[0].in_features
    differentiable = torch.is_grad_enabled() or autocast_dtype(x.device) is not None or compiling
    if not differentiable and not matmul.uses_onednn(x, linears[0].weight):  # oneDNN has no `out=`
        y = x.new_empty(len(x), sum(rows))
        for linear, part in zip(linears, y.split(rows, dim=1), strict=True):
            if linear.bias is None:
                torch.mm(x, linear.weight.t(), out=part)
            else:
                torch.addmm(linear.bias, x, linear.weight.t(), out=part)
        return y
    if copy_results:
        return torch.cat([matmul.linear(x, linear.weight, linear.bias) for linear in linears], dim=1)
    return matmul.linear(x, *stacked(linears))


def stacked(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Return the weights of linear layers, all or none of which have a bias, one below the other; and their biases."""
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return torch.cat([linear.weight for linear in linears]), bias


def common_group(modules: Sequence[nn.Module]) -> PackedWeight | None:
    """Return the packed weight that these linear layers share, one after the other; None if there is none."""
    group: PackedWeight | None = getattr(modules[0], "group", None)
    columns = 0
    for module in modules:
        if not isinstance(module, PackedLinear) or is_watched(module):
            return None
        if module.group is not group or module.first != columns:
            return None
        columns += module.out_features
    return group if group is not None and columns == group.columns else None
