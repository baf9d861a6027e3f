"""Find out which code a module runs: its library's own, or a replacement, or that of a class derived by a user."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from inspect import Parameter, isfunction, signature
from typing import Any

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bertfast.architectures.architecture import Architecture
from bertfast.runtime.torch_compat import constant_result, module_hooks, unsharded_class

Function = Callable[..., Any]


def original_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a module had before it was fused, and before FSDP2 derived one from it."""
    original: type[nn.Module] = getattr(kind, "original", kind)  # derived by FSDP2 if the model was sharded first
    return unsharded_class(original)


def is_genuine(architecture: Architecture, module: nn.Module, *, is_called: bool = False) -> bool:
    """Return whether a module is of a class of the family, and runs the methods that were written there.

    Args:
        architecture: The family's.
        module: The module.
        is_called: Whether it is called, so that its methods may be decorated by `torch.no_grad`.
    """
    kind = original_class(type(module))
    return kind.__module__ == architecture.module and _replaced_method(kind, kind, is_called) is None


def runs_family_forward(architecture: Architecture, model: nn.Module) -> bool:
    """Return whether a model runs its family's `forward` and what that calls, and not a user's or a replacement."""
    return replaced_method(architecture, model) is None


def replaced_method(architecture: Architecture, model: nn.Module) -> str | None:
    """Return the name of a method that a model runs instead of its family's; None if it runs all of these."""
    kind = original_class(type(model))
    return _replaced_method(kind, next(base for base in kind.__mro__ if base.__module__ == architecture.module))


@constant_result
def runs_family_loss(architecture: Architecture, model: nn.Module) -> bool:
    """Return whether a head runs its family's `forward`, and in it PyTorch's own cross entropy."""
    loss = getattr(architecture.modeling, "CrossEntropyLoss", nn.CrossEntropyLoss)
    return (
        runs_family_forward(architecture, model)
        and loss is nn.CrossEntropyLoss
        and is_original(loss, "forward")
        and (architecture.loss is None or _is_plain_cross_entropy(getattr(model, architecture.loss, None)))
        and _is_written_in(nn.functional.cross_entropy, "torch.nn.functional", "cross_entropy")
        and not (_calls_loss_function(original_class(type(model))) and _has_other_loss_function(model))
    )


def _calls_loss_function(kind: type[nn.Module]) -> bool:
    """Return whether a class of transformers 5 computes its loss by what its models have as `loss_function`."""
    function: Any = kind.forward
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return isfunction(function) and "loss_function" in function.__code__.co_names


def _has_other_loss_function(model: Any) -> bool:
    """Return whether a model's `loss_function` is another than transformers' for masked LM."""
    module, function = "transformers.loss.loss_utils", model.loss_function
    is_own = _is_written_in(function, module, "ForMaskedLMLoss")
    return not is_own or not _is_written_in(function.__globals__["fixed_cross_entropy"], module, "fixed_cross_entropy")


def overridden_method(kind: type[nn.Module]) -> str | None:
    """Return the first method that a user's class on a fused one has instead of its family's; None if it has none."""
    bases = kind.__mro__
    first_fused = next((index for index, base in enumerate(bases) if "original" in vars(base)), 0)
    original: type = original_class(kind)
    names = method_names(original)
    return next((name for name in names if any(name in vars(base) for base in bases[:first_fused])), None)


def _is_plain_cross_entropy(module: nn.Module | None) -> bool:
    """Return whether a loss, None for one made at each call, is the mean cross entropy of labels that count."""
    if module is None:
        return True
    plain = nn.CrossEntropyLoss()
    options = ("weight", "ignore_index", "reduction", "label_smoothing")
    same = type(module) is type(plain) and all(getattr(module, name) == getattr(plain, name) for name in options)
    return same and not is_changed(module)


def takes_loss_keywords(kind: type[nn.Module]) -> bool | None:
    """Return whether Trainer passes `num_items_in_batch` to a user's class, as it decides that without bertfast.

    Returns:
        None if neither the class nor a base that a user wrote has an `accepts_loss_kwargs` or a `forward` of its own.
    """
    libraries = ("bertfast.", "transformers.", "torch.")
    tables = [vars(base) for base in kind.__mro__ if not base.__module__.startswith(libraries)]
    tables = [table for table in tables if "original" not in table]  # of a fused class, which has its user's module
    declared: bool | None = next((x["accepts_loss_kwargs"] for x in tables if "accepts_loss_kwargs" in x), None)
    forward = next((x["forward"] for x in tables if "forward" in x), None)
    if declared is not None or forward is None:
        return declared
    return any(x.kind is Parameter.VAR_KEYWORD for x in signature(forward).parameters.values())


def is_original(kind: type, name: str) -> bool:
    """Return whether a class still has the method of that name that was written in its body."""
    return _is_written_in(getattr(kind, name), kind.__module__, f"{kind.__name__}.{name}")


@cache
def method_names(kind: type) -> tuple[str, ...]:
    """Return the names of the functions in a class body, without those that make, load or resize a module."""
    others = ("__", "_init_weights", "get_", "set_", "prune", "_prune", "tie_", "_tie", "resize_", "extra_repr")
    functions = [name for name, x in vars(kind).items() if isfunction(x) or isinstance(x, staticmethod)]
    names = [name for name in functions if not name.startswith(others)]
    return (*dict.fromkeys(["forward", *names]),)


def attention_function(architecture: Architecture, name: str | None) -> Function | None:
    """Return what a configuration's attention implementation resolves to; None if this version resolves none."""
    eager: Function | None = getattr(architecture.modeling, "eager_attention_forward", None)
    function = eager if name in (None, "eager") else ALL_ATTENTION_FUNCTIONS.get(name, eager)
    return None if function is None else _without_partial(function)


def foreign_attention(architecture: Architecture, name: str | None) -> str | None:
    """Return the name of what `attention_function` returns; None if transformers has written it."""
    function = attention_function(architecture, name)
    if function is None:
        return None
    owner: Any = function if hasattr(function, "__qualname__") else type(function)  # of an object that is called
    # functools.wraps copies names, but not the module in which a wrapper was written.
    module = function.__globals__["__name__"] if isfunction(function) else owner.__module__
    return None if str(module).startswith("transformers.") else f"{module}.{owner.__qualname__}"


def is_changed(module: nn.Module) -> bool:
    """Return whether a module does more than its class says, ignoring hooks of transformers and distributed engines."""
    if not isinstance(module, nn.Module):  # a function as activation
        return False
    kind = type(module)
    registered = (hook for table in module_hooks(module) for hook in table.values())
    has_own_method = any(callable(x) and hasattr(kind, name) for name, x in vars(module).items())
    return has_own_method or any(_changes_calls(hook, module) for hook in registered)


def _changes_calls(hook: Function, module: nn.Module) -> bool:
    """Return whether someone but transformers and the engines that shard a model registered a hook."""
    function = _without_partial(hook)
    name = getattr(function, "__module__", None) or type(function).__module__
    if name == "transformers.utils.output_capturing" or name.startswith(("torch.distributed.", "torch.nn.parallel.")):
        return False
    # Embeddings whose layers are recomputed are made to require a gradient, which those that are trained do anyway.
    requires_gradients = getattr(function, "__name__", None) == "make_inputs_require_grads"
    is_harmless = requires_gradients and name.startswith("transformers.")
    return not (is_harmless and all(p.requires_grad for p in module.parameters()))


def _without_partial(function: Function) -> Function:
    while isinstance(function, partial):
        function = function.func
    return function


def _replaced_method(kind: type, family_class: type, is_called: bool = False) -> str | None:
    """Return the first method of a class that is not the one in the body of `family_class`, itself or a base."""
    module, name = family_class.__module__, family_class.__name__
    methods = {own: getattr(kind, own) for own in method_names(family_class)}
    if is_called:
        methods = {own: _inside_no_grad(function) for own, function in methods.items()}
    return next((own for own, x in methods.items() if not _is_written_in(x, module, f"{name}.{own}")), None)


def _inside_no_grad(function: Function) -> Function:
    """Return the function that `torch.no_grad` decorates, or a function without that decorator as it is."""
    module = "torch.utils._contextlib"
    while isfunction(function) and function.__globals__["__name__"] == module and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


@cache
def _is_written_in(function: Function, module: str, name: str) -> bool:
    # functools.wraps copies names, but not the module in which a wrapper was written.
    library = module.partition(".")[0] + "."
    while isfunction(function) and function.__globals__["__name__"].startswith(library):
        if not hasattr(function, "__wrapped__"):
            return function.__globals__["__name__"] == module and function.__qualname__ == name
        function = function.__wrapped__
    return False
