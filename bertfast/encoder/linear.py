"""Decide when a linear layer's parameters may be read instead of calling the layer."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn

from bertfast.runtime.torch_compat import is_sharded, module_hooks, unsharded_class


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a module is a plain linear layer, whose `weight` and `bias` can be read instead of calling it.

    A LoRA-wrapped, quantised, parametrised or hooked layer is of another type, or has hooks, and must be called.
    """
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and type(module.bias) is nn.Parameter
        and not is_watched(module)
    )


def is_linear(module: nn.Module) -> bool:
    """Return what `is_plain` returns once FSDP2 has gathered sharded parameters for the module around them."""
    if unsharded_class(type(module)) is not nn.Linear or (is_watched(module) and not is_sharded(module)):
        return False
    kinds = {type(module.weight), type(module.bias)} - {nn.Parameter}
    # DTensor is recognised by its module's name, since importing it is slow.
    return all(kind.__module__.startswith("torch.distributed.tensor") for kind in kinds)


def is_watched(module: nn.Module) -> bool:
    """Return whether calling the module does more than its class says: it has hooks, or a `forward` of its own."""
    return any(module_hooks(module)) or "forward" in vars(module)
