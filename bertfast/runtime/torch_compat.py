"""PyTorch's private interfaces, and what its versions and devices differ in. Checked on torch 2.13."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_transformed() -> bool:
    """Return whether a transform of `torch.func` or forward-mode differentiation is active.

    The kernels have no rules for them; operations of PyTorch have. `torch.compile` traces inside of a transform, too:
    kernels there gave gradients of zero, silently.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# What `torch.compiler.assume_constant_result` sets, which would import the compiler: `torch.compile` calls the function
# while it traces, and guards the stack of transforms itself.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_global_hooks() -> bool:
    """Return whether hooks are registered for all modules, as profilers and counters of FLOPs do."""
    return torch.nn.modules.module._has_any_global_hook()


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
