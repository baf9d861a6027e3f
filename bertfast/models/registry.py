"""Which class fuses which: static classes for those of transformers, derived ones for those of users."""

from __future__ import annotations

import functools
from inspect import Parameter, signature
from typing import ClassVar

from torch import nn

from bertfast.architectures import Architecture

SNAPSHOT_HOLDER = "_bertfast_snapshot"  # the attribute in which an encoder keeps what `eligibility` found
_FUSED: dict[type, type] = {}


class Fused:
    """Base of the mixins that fuse a module.

    A subclass with the keyword `architecture` is the fused class of `original`, its second base, by `mixin`, its first.
    """

    architecture: ClassVar[Architecture]
    original: ClassVar[type]
    mixin: ClassVar[type]

    def __init_subclass__(cls, *, architecture: Architecture | None = None, **keywords):
        super().__init_subclass__(**keywords)
        if architecture is not None:  # else it is a mixin, or a user's class on a fused one
            cls.architecture = architecture
            cls.mixin, cls.original = cls.__bases__[:2]
            _FUSED[cls.original] = cls
            if hasattr(cls, "passes_keywords"):
                _name_arguments(cls)


def fused_class(kind: type) -> type | None:
    """Return the class that a module of class `kind` is fused as; None if there is none, or if it is fused."""
    if issubclass(kind, Fused):
        return None
    base = next((base for base in kind.__mro__ if base in _FUSED), None)
    if base is not None and base is not kind:  # a user's class: derive its fused class, under the same name
        attributes = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        attributes["__reduce_ex__"] = _reduce
        bases = (_FUSED[base].mixin, kind)
        return type(kind.__name__, bases, attributes, architecture=_FUSED[base].architecture)
    return _FUSED.get(base)


def fuse(model: nn.Module) -> None:
    """Change the class of every module in a tree that can be fused."""
    for module in [*model.modules()]:
        kind = fused_class(type(module))
        if kind is not None:
            _change_class(module, kind)


def unfuse(model: nn.Module) -> None:
    """Give every fused module of a tree back the class that it had."""
    for module in [*model.modules()]:
        if isinstance(module, Fused):
            vars(module).pop(SNAPSHOT_HOLDER, None)
            _change_class(module, type(module).original)


def _change_class(module: nn.Module, kind: type) -> None:
    module.__class__ = kind
    try:  # transformers 5 finds the outputs that can be recorded by a module's class
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
    except ImportError:  # transformers 4
        return
    if hasattr(module, "_can_record_outputs"):
        _CAN_RECORD_REGISTRY[module] = module._can_record_outputs


def _reduce(module: nn.Module, protocol):  # a pickle finds classes by name, and by that name it would find the original
    return _restore, (type(module).original,), vars(module)


def _restore(original: type) -> nn.Module:
    kind = fused_class(original)
    return kind.__new__(kind)


def _name_arguments(kind: type) -> None:
    """Give a model's fused class a `forward` that passes on all arguments by name.

    It has the signature of the original's `forward`, which Trainer reads.
    """
    original_forward = kind.original.forward
    parameters = [*signature(original_forward).parameters.values()][1:]
    names = [x.name for x in parameters if x.kind is Parameter.POSITIONAL_OR_KEYWORD]

    @functools.wraps(original_forward)
    def forward(self, *args, **kwargs):
        if len(args) > len(names):  # a user's forward takes arguments that have no name
            return original_forward(self, *args, **kwargs)
        return super(kind, self).forward(**dict(zip(names, args, strict=False)) | kwargs)

    kind.forward = forward
    kind.passes_keywords = any(x.kind is Parameter.VAR_KEYWORD for x in parameters)
