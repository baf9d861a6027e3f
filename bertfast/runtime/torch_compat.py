"""PyTorch's private interfaces, and differences between its versions and devices. Checked on torch 2.13 and 2.14.

No other module uses names of PyTorch that start with an underscore, except for `torch._foreach_…`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
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

    PyTorch's operations have rules for them, the kernels do not. `torch.compile` also traces inside a transform: there
    the kernels returned gradients of zero without an error.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def has_global_hooks() -> bool:
    """Return whether hooks are registered for all modules, as profilers and FLOP counters do."""
    return bool(torch.nn.modules.module._has_any_global_hook())


def unsharded_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a module had before FSDP2 derived one from it."""
    return next(base for base in kind.__mro__ if not base.__module__.startswith("torch.distributed."))


@constant_result
def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP2 gathers parameters for the calls of a module."""
    return any(base.__module__.startswith("torch.distributed.") for base in type(module).__mro__)


def call_inside(modules: Iterable[nn.Module], function: Callable[..., Any], *args: Any) -> Any:
    """Call a function as the `forward` of those modules that FSDP2 shards, the last one outermost.

    Their hooks gather the parameters that `function` reads without calling these modules.
    """
    for module in modules:
        if is_sharded(module):
            function = partial(_call_as_forward, module, function)
    return function(*args)


def _call_as_forward(module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    def forward(*args: Any) -> Any:
        del vars(module)["forward"]  # it would count as a method of the module's own
        return function(*args)

    vars(module)["forward"] = forward
    try:
        return module(*args)
    finally:
        vars(module).pop("forward", None)


def module_hooks(module: nn.Module) -> tuple[dict[int, Callable[..., Any]], ...]:
    """Return a module's hooks by kind."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def module_tables(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Return a module's own tables of parameters, buffers and submodules, by their names."""
    return module._parameters, module._buffers, module._modules


def any_parameter(module: nn.Module) -> Tensor | None:
    """Return a parameter, or the corresponding tensor of a replica made by DataParallel, which has no parameters.

    Returns:
        None for a module without either, whose parameters FSDP1 has flattened.
    """
    parameter = next(module.parameters(), None)
    if parameter is not None:
        return parameter
    tables: Iterator[dict[str, Tensor]] = (getattr(child, "_former_parameters", {}) for child in module.modules())
    return next((tensor for table in tables for tensor in table.values()), None)


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
    """Return whether a backward pass runs on a batch of gradients: with `is_grads_batched=True`, or inside `vmap`."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(gradient) or functorch.is_batchedtensor(gradient)


def backward_retains_graph() -> bool:
    """Return whether the running backward pass was started with `retain_graph=True`."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def is_traced() -> bool:
    """Return whether operations are traced or recorded, so that the host must not read values.

    `torch.compile` and transforms of `torch.func` trace; fake tensors and recorders of a step are dispatch modes.
    """
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or is_transformed()


def is_readable(x: Tensor) -> bool:
    """Return whether the host can read a tensor's values without waiting: it is a plain CPU tensor and not traced."""
    return type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return autocast's dtype; None if it is disabled, or on a device that has none, such as "meta"."""
    kind = device.type
    if kind not in ("cpu", "cuda") and not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def assert_on_device(condition: Tensor, message: str) -> None:
    """Assert that a bool tensor [] is true when the device computes it; the host does not wait."""
    torch._assert_async(condition, message)


def registered_kernels(prefixes: tuple[str, ...]) -> set[tuple[str, str]]:
    """Return (operation, device type) of the kernels for CPUs and GPUs of the operations `bertfast::<prefix>…`."""
    return {
        (name.removeprefix("bertfast::"), device)
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(tuple(f"bertfast::{prefix}" for prefix in prefixes))
        for device in ("cpu", "cuda")
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())
    }


def has_onednn() -> bool:
    """Return whether this PyTorch contains oneDNN."""
    return torch._C._has_mkldnn


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias, computed by oneDNN: x [N, K], weight [M, K], bias [M] -> [N, M]."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def onednn_add_linear(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return total + x W^T, computed by oneDNN: total [N, M], x [N, K], weight [M, K] -> [N, M]."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, total, weight, None, "add")
    return y


def cpu_has_bf16_gemm() -> bool:
    """Return whether this CPU has instructions for bf16 GEMMs."""
    return torch.cpu._is_avx512_bf16_supported() or cpu_has_amx()


def cpu_has_amx() -> bool:
    """Return whether this CPU has AMX, tiles for GEMMs in bf16 and int8, and this process may use it."""
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
