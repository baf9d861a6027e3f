"""Which class fuses which: static ones for BERT's, derived ones for those of other families and of users."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor, nn
from transformers import BertConfig, GenerationMixin, PreTrainedModel

from bertfast.architectures import IS_TRANSFORMERS_4, Architecture, family_of, methods
from bertfast.encoder import MaskedLMParts
from bertfast.encoder.packed_linear import FROZEN, has_int8, is_frozen, require_unchanged
from bertfast.models.quantised_config import is_quantised, unmark_model

SNAPSHOT = "_bertfast_snapshot"  # the attribute in which an encoder keeps its `Snapshot`
IS_FROZEN = "_bertfast_is_frozen"  # that in which an encoder keeps whether its weights are packed
PACKED_LAYER = "_bertfast_packed_layer"  # that in which a layer of a frozen encoder keeps its `PackedLayer`
_FUSED: dict[type[nn.Module], type[Fused]] = {}
_MIXINS: dict[str, type[Fused]] = {}  # by the roles that a family's declaration names


class Fused(nn.Module):
    """Base of the mixins that fuse a module.

    A subclass with the keyword `architecture` is the fused class of `original`, its second base, by `mixin`, its first.
    A mixin with the keyword `role` fuses the classes that a family declares for this role.
    """

    architecture: ClassVar[Architecture]
    original: ClassVar[type[nn.Module]]
    mixin: ClassVar[type[Fused]]

    def __init_subclass__(
        cls, *, architecture: Architecture | None = None, role: str | None = None, **keywords: Any
    ) -> None:
        super().__init_subclass__(**keywords)
        if role is not None:
            _MIXINS[role] = cls
        if architecture is not None:  # else it is a mixin, or a user's class on a fused one
            cls.architecture = architecture
            cls.mixin, cls.original = cls.__bases__[:2]
            _FUSED[cls.original] = cls

    def train(self, mode: bool = True) -> Self:
        """Refuse training mode, before any module has changed, if a module is packed for inference."""
        if mode and is_frozen(self):
            raise RuntimeError(FROZEN)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Refuse another dtype or device, too."""
        if is_frozen(self):
            require_unchanged(fn, self)
        applied: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return applied

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Refuse other weights, too, before any has been loaded."""
        if is_frozen(self):
            raise RuntimeError(FROZEN)
        super()._load_from_state_dict(*args, **kwargs)


class FusedModel(Fused, PreTrainedModel):
    """A model whose inner modules are fused when it is made. Its `forward` gets all arguments by name."""

    accepts_loss_kwargs: ClassVar[bool]  # read by Trainer; not every class has it
    # Opens a quantised model, and returns None for others; set by its module, which imports this one.
    open_quantised: ClassVar[Callable[..., Any] | None] = None
    if TYPE_CHECKING:
        config: BertConfig  # or another family's, which has the same fields

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "original" in vars(cls):
            _name_arguments(cls)
            _keep_signature(cls)
        takes_loss_keywords = methods.takes_loss_keywords(cls)
        if takes_loss_keywords is not None:  # a user's class decides it, as with transformers
            cls.accepts_loss_kwargs = takes_loss_keywords

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        fuse(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does; the folder or hub id of a quantised model gives a quantised one.

        Returns:
            The model; with `output_loading_info=True` a pair of it and transformers' loading information.
        """
        opened = cls.open_quantised and cls.open_quantised(cls, pretrained_model_name_or_path, *args, **kwargs)
        return opened or super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return whether the class that is fused is one of a user: transformers renames weights only of its own."""
        original: Any = vars(cls).get("original")
        return original is None or bool(original.is_custom_code())

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save a model; see transformers. Quantised layers stay apart, where a family's files join several layers."""
        if is_quantised(self.config) and not has_int8(self):  # it was made of the configuration of one that is
            unmark_model(self)
        if has_int8(self) and not IS_TRANSFORMERS_4:
            kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)

    def masked_lm_parts(self) -> MaskedLMParts:
        """Return the modules of the masked-LM head of a model that has one."""
        return self.architecture.masked_lm_parts(self)

    def pooling(self) -> str:
        """Return what the head for sequences reads: see `bertfast.encoder.PackedHead`."""
        return self.architecture.pooling_of(self)

    def task_steps(self) -> list[Callable[[Tensor], Tensor]]:
        """Return what the head of a task calls one after the other: see `bertfast.encoder.PackedHead`."""
        return self.architecture.task_steps(self)


def fused_class(kind: type[nn.Module]) -> type[Fused] | None:
    """Return the class that a module of class `kind` is fused as; None if there is none, or if it is fused."""
    if issubclass(kind, Fused):
        return None
    fused = next((fused for base in kind.__mro__ if (fused := _family_class(base)) is not None), None)
    if fused is None or fused.original is kind:
        return fused
    # A user's class: derive its fused class, under the same name.
    attributes = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    attributes["__reduce_ex__"] = _reduce
    return type(kind.__name__, (fused.mixin, kind), attributes, architecture=fused.architecture)


def _family_class(kind: type) -> type[Fused] | None:
    """Return the fused class of a class of transformers, which is derived when it is first asked for."""
    if kind in _FUSED:
        return _FUSED[kind]
    architecture = family_of(kind)
    if architecture is None:
        return None
    role = next((role for role, names in architecture.classes.items() if kind.__name__ in names), None)
    if role is None:
        return None
    # Where a class must have GenerationMixin, transformers 4 looks at its direct bases.
    generation = (GenerationMixin,) if issubclass(kind, GenerationMixin) else ()
    attributes = {"__module__": "bertfast.models.families", "__doc__": f"`transformers`' {kind.__name__}, fused."}
    derived: type[Fused] = type(
        kind.__name__, (_MIXINS[role], kind, *generation), attributes, architecture=architecture
    )
    return derived


def fuse(model: nn.Module, left: Collection[nn.Module] = ()) -> None:
    """Change the class of every module in a tree that can be fused, except for encoders in `left` and their heads."""
    kept = {module for encoder in left for module in encoder.modules()}
    for module in [*model.modules()]:
        kind = fused_class(type(module))
        if kind is not None and module not in kept and getattr(module, "base_model", None) not in kept:
            _change_class(module, kind)


def unfuse(model: nn.Module, left: Collection[nn.Module] = ()) -> None:
    """Restore the original class of every fused module in a tree, except for those in `left`."""
    for module in [*model.modules()]:
        if isinstance(module, Fused) and module not in left:
            vars(module).pop(SNAPSHOT, None)
            vars(module).pop(PACKED_LAYER, None)
            _change_class(module, module.original)


def _change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind
    try:  # transformers 5 finds the outputs that can be recorded by a module's class
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
    except ImportError:  # transformers 4
        return
    if isinstance(module, PreTrainedModel):
        registry: Any = _CAN_RECORD_REGISTRY  # a plain dict by names of classes in the first versions
        registry[str(kind) if type(registry) is dict else module] = module._can_record_outputs


def _reduce(module: Fused, protocol: int) -> tuple[Any, ...]:
    # A pickle finds classes by their names, and by that name it would find the original.
    return _restore, (type(module).original,), vars(module)


def _restore(original: type[nn.Module]) -> nn.Module:
    kind = fused_class(original) or original
    return kind.__new__(kind)


def _keep_signature(kind: type[FusedModel]) -> None:
    """Give a model's fused class a constructor with the signature of the original's."""

    @functools.wraps(kind.original.__init__)
    def __init__(self: FusedModel, *args: Any, **kwargs: Any) -> None:
        super(kind, self).__init__(*args, **kwargs)

    kind.__init__ = __init__  # type: ignore[method-assign]  # the same, under a signature that tools can read


def _name_arguments(kind: type[FusedModel]) -> None:
    """Give a model's fused class a `forward` that passes on all arguments by name.

    It has the signature of the original's `forward`, which Trainer reads.
    """
    original_forward = kind.original.forward
    parameters = [*signature(original_forward).parameters.values()][1:]
    names = [x.name for x in parameters if x.kind is Parameter.POSITIONAL_OR_KEYWORD]

    @functools.wraps(original_forward)
    def forward(self: FusedModel, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(names):  # a user's forward takes arguments that have no name
            return original_forward(self, *args, **kwargs)
        return super(kind, self).forward(**dict(zip(names, args, strict=False)), **kwargs)

    kind.forward = forward
