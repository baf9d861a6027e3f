"""Which class fuses which: static ones for the classes of transformers, and derived ones for those of users."""

from __future__ import annotations

import functools
from collections.abc import Callable
from inspect import Parameter, signature
from typing import ClassVar

from torch import nn

from bertfast.architectures import Architecture

_FUSED: dict[type, type] = {}


class Fused:
    """What a fused module is besides its own class, `original`, which comes behind the mixin in its bases."""

    architecture: ClassVar[Architecture]
    original: ClassVar[type]
    mixin: ClassVar[type]


def register(architecture: Architecture) -> Callable[[type], type]:
    """Return a decorator that makes a class the fused one of the class of transformers that it derives from."""

    def complete(kind: type) -> type:
        _FUSED[kind.__bases__[1]] = _complete(kind, architecture)
        return kind

    return complete


def fused_class(kind: type) -> type | None:
    """Return the class that a module of class `kind` is fused as; None if there is none, or if it is fused."""
    if issubclass(kind, Fused):
        return None
    base = next((base for base in kind.__mro__ if base in _FUSED), None)
    return None if base is None else _FUSED[base] if base is kind else _derived(kind, _FUSED[base])


def fuse(model: nn.Module) -> None:
    """Change the class of every module in a tree that can be fused."""
    for module in [*model.modules()]:
        kind = fused_class(type(module))
        if kind is not None:
            module.__class__ = kind
            _keep_recordable(module)


def unfuse(model: nn.Module) -> None:
    """Give every fused module of a tree back the class that it had."""
    for module in [*model.modules()]:
        if isinstance(module, Fused):
            vars(module).pop("_bertfast_snapshot", None)
            module.__class__ = type(module).original
            _keep_recordable(module)


def _complete(kind: type, architecture: Architecture) -> type:
    kind.mixin, kind.original = kind.__bases__[:2]
    kind.architecture = architecture
    if hasattr(kind, "arguments"):
        _name_arguments(kind)
    return kind


@functools.cache
def _derived(kind: type, fused: type) -> type:
    """Derive the fused class of a user's class, under the same name."""
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    made = type(kind.__name__, (fused.mixin, kind), names | {"__reduce_ex__": _reduce})
    return _complete(made, fused.architecture)


def _reduce(module: nn.Module, protocol):  # a pickle finds classes by name, and by that name it would find the original
    return _remake, (type(module).original,), vars(module)


def _remake(original: type) -> nn.Module:
    kind = fused_class(original)
    return kind.__new__(kind)


def _name_arguments(kind: type) -> None:
    """Give a model's fused class the signature of its original's `forward`, which Trainer reads, and keep the names."""

    @functools.wraps(kind.original.forward)
    def forward(self, *args, **kwargs):
        return super(kind, self).forward(*args, **kwargs)

    parameters = signature(kind.original.forward).parameters
    kind.forward = forward
    kind.arguments = tuple(parameters)[1:]
    kind.passes_keywords = any(x.kind is Parameter.VAR_KEYWORD for x in parameters.values())


def _keep_recordable(module: nn.Module) -> None:
    """Tell transformers 5 under the name of a module's new class which outputs can be recorded."""
    try:
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
    except ImportError:  # transformers 4
        return
    if hasattr(module, "_can_record_outputs"):
        _CAN_RECORD_REGISTRY[module] = module._can_record_outputs
