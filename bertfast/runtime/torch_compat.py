"""PyTorch's private interfaces, and what its versions and devices differ in. Checked on torch 2.13."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_result(function: Function) -> Function:
    """Have `torch.compile` call a function while it traces, and compile its result in as a constant.

    This is `torch.compiler.assume_constant_result`, which would import the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # what the compiler looks for
    return function


@constant_result  # torch.compile guards the stack of transforms itself
def is_transformed() -> bool:
    """Return whether a transform of `torch.func` or forward-mode differentiation is active.

    The kernels have no rules for them; operations of PyTorch have. `torch.compile` traces inside of a transform, too:
    kernels there gave gradients of zero, silently.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def has_global_hooks() -> bool:
    """Return whether hooks are registered for all modules, as profilers and counters of FLOPs do."""
    return bool(torch.nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]  # of PyTorch


def module_hooks(module: nn.Module) -> tuple[dict[int, Callable[..., Any]], ...]:
    """Return a module's hooks by kind."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def module_tables(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Return a module's own tables of parameters, buffers and submodules, by their names."""
    return module._parameters, module._buffers, module._modules


def any_parameter(module: nn.Module) -> Tensor:
    """Return a parameter, or the tensor in its place in a replica that DataParallel made, which has no parameters."""
    parameter = next(module.parameters(), None)
    if parameter is not None:
        return parameter
    tables: Iterator[dict[str, Tensor]] = (getattr(child, "_former_parameters", {}) for child in module.modules())
    return next(tensor for table in tables for tensor in table.values())


def write_count(x: Tensor) -> int | None:
    """Return how often a tensor was written in place, None for one made in inference mode, which does not count."""
    return None if x.is_inference() else x._version


def has_values(x: Tensor) -> bool:
    """Return whether a tensor holds values: it is neither on "meta" nor a fake one, as compilers trace with."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def is_jit_tracing() -> bool:
    """Return whether `torch.jit.trace` records operations."""
    return torch._C._is_tracing()


def is_batched(gradient: Tensor) -> bool:
    """Return whether a backward pass got a batch of gradients in one: `is_grads_batched=True`, or `vmap` around it."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(gradient) or functorch.is_batchedtensor(gradient)


def backward_retains_graph() -> bool:
    """Return whether the running backward pass was started with `retain_graph=True`."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def is_traced() -> bool:
    """Return whether operations are traced or recorded rather than only run: then the host must not read any values.

    `torch.compile` and transforms of `torch.func` trace; fake tensors and recorders of a step are dispatch modes.
    """
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or is_transformed()


def is_readable(x: Tensor) -> bool:
    """Return whether the host can read a tensor's values without waiting: a plain CPU tensor, not a traced one."""
    return type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return autocast's dtype where it is on; None where it is off, and on "meta", which has none."""
    kind = device.type
    if kind not in ("cpu", "cuda") and not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
