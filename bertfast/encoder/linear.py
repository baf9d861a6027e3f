"""When a linear layer's parameters may be read instead of calling the layer."""

from __future__ import annotations

from torch import nn


def is_plain(module: nn.Module) -> bool:
    """Whether reading `weight` and `bias` is what calling the module does: a linear layer with nothing around it.

    A LoRA-wrapped, quantised, parametrised or hooked layer is of another type, or has hooks, and must be called.
    """
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and type(module.bias) is nn.Parameter
        and not is_watched(module)
    )


def is_linear(module: nn.Module) -> bool:
    """As `is_plain`, also while the parameters are sharded: FSDP2 gathers them when the module around them runs."""
    if type(module) is not nn.Linear or is_watched(module):
        return False
    kinds = {type(module.weight), type(module.bias)} - {nn.Parameter}
    return all(
        kind.__module__.startswith("torch.distributed.tensor") for kind in kinds
    )  # DTensor, whose import is slow


def is_watched(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says: it has hooks, or a `forward` of its own."""
    return any(hooks(module)) or "forward" in vars(module)


def hooks(module: nn.Module) -> tuple[dict, ...]:
    """A module's hooks by kind."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
