"""Shared by all operators: the names of the implementations, and which of them runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from bertfast.ops import cuda_build, native
from bertfast.runtime.torch_compat import autocast_dtype, is_transformed

Implementation = Literal["reference", "cpu", "triton", "cuda"]
"""Plain PyTorch, the native library, Triton, or CUDA C++."""


HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON:  # importing the modules registers their operators
    from bertfast.kernels import (  # noqa: F401
        add_layer_norm,
        attention,
        attention_backward,
        bias_gelu,
        embeddings,
        gated_activation,
        gelu_layer_norm,
        linear_cross_entropy,
        linear_gelu,
        pre_norm,
        rotary,
        sum_by_index,
    )
_CPU_DTYPES = (torch.float32, torch.bfloat16)
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs kernels on CPU tensors, for tests


class Activations(Protocol):
    """The properties of a tensor that decide which implementation supports it."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def is_cuda(self) -> bool: ...

    @property
    def shape(self) -> Sequence[int]: ...


def resolve(
    operation: str, requested: Implementation | None, x: Activations, unsupported: str | None = None
) -> Implementation:
    """Return the implementation of an operation for tensors like `x`.

    By default that is the fastest one that supports them, else the reference: Triton on a GPU, the native library on
    a CPU. An implementation that is requested is never replaced by another.

    Args:
        operation: Name of the operator.
        requested: The caller's `implementation`; None: the default.
        x: The operator's main input.
        unsupported: Why the operation's kernels do not support the other arguments; None if they do.

    Raises:
        ValueError: The requested implementation does not exist or does not support the arguments.
    """
    unsupported = unsupported or _empty_rows_reason(requested, x)
    if requested is None:
        fastest: Implementation = "triton" if x.is_cuda else "cpu"
        return fastest if unsupported_reason(fastest, operation, x) is None and unsupported is None else "reference"
    if requested not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"{operation}: implementation must be one of {known}, got {requested!r}")
    reason = unsupported_reason(requested, operation, x) or (None if requested == "reference" else unsupported)
    if reason is not None:
        remedy = "pass implementation='reference', which supports all tensors"
        raise ValueError(f"{operation}: implementation {requested!r} is not available: {reason}; {remedy}")
    return requested


def _empty_rows_reason(requested: Implementation | None, x: Activations) -> str | None:
    """Return why a GPU's kernels, which divide rows into blocks, cannot run on `x`; None if they can."""
    on_gpu = x.is_cuda if requested is None else requested in ("triton", "cuda")
    return "its kernels take rows of at least one element" if on_gpu and x.shape and x.shape[-1] == 0 else None


def dtypes_reason(requested: Implementation | None, x: Activations, *others: Tensor | torch.dtype | None) -> str | None:
    """Return why an operation's kernels do not support the dtypes of its other tensors; None if they do.

    Args:
        requested: The caller's `implementation`.
        x: The operator's main input.
        others: Its other tensors, or the dtypes of its results.
    """
    supported = _CPU_DTYPES if requested == "cpu" or (requested is None and not x.is_cuda) else _GPU_DTYPES
    for other in others:
        dtype = other.dtype if isinstance(other, Tensor) else other
        if dtype is not None and dtype not in supported:
            return _dtype_reason(supported, dtype)
    return None


def _dtype_reason(supported: tuple[torch.dtype, ...], dtype: torch.dtype) -> str:
    *first, last = (str(each).removeprefix("torch.") for each in supported)
    return f"its kernels support {', '.join(first)} and {last}, got {dtype}"


def run(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Return function.apply(*arguments), or only its forward pass if gradients are disabled.

    The short cut saves some microseconds, which matter for short inputs.
    """
    apply: Callable[..., Any] = function.apply
    if torch.compiler.is_compiling():
        return apply(*_distinct(arguments))
    if torch.is_grad_enabled():
        return apply(*arguments)
    return function.forward(_NoBackward(), *arguments)


def _distinct(arguments: tuple[Any, ...]) -> list[Any]:
    """Return the arguments, repeated tensors as views: torch.compile cannot trace a Function with repeated ones."""
    result: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor) and any(argument is other for other in result):
            argument = argument.view_as(argument)
        result.append(argument)
    return result


class _NoBackward:
    """The context of a forward pass that is not followed by a backward pass."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def operator(implementation: Implementation, name: str) -> Callable[..., Any]:
    """Return `torch.ops.bertfast.<implementation>_<name>`, which runs the kernels of an implementation."""
    registered: Callable[..., Any] = getattr(torch.ops.bertfast, f"{implementation}_{name}")
    return registered


def cast_sums(sums: Tensor, *parameters: Tensor | torch.dtype | None) -> list[Tensor | None]:
    """Return the rows of a kernel's fp32 sums in the dtypes of their parameters; None for absent parameters."""
    dtypes = [parameter.dtype if isinstance(parameter, Tensor) else parameter for parameter in parameters]
    return [None if dtype is None else row.to(dtype) for row, dtype in zip(sums, dtypes, strict=True)]


def unsupported_reason(implementation: Implementation, operation: str, x: Activations) -> str | None:
    """Return why an implementation cannot run `operation` on tensors like `x`; None if it can."""
    if implementation == "reference":
        return None
    if is_transformed():
        return "only the reference supports torch.func and forward-mode differentiation"
    if implementation == "triton":
        return _triton_unsupported_reason(x)
    if implementation == "cpu":
        return _cpu_unsupported_reason(x)
    return _cuda_unsupported_reason(operation, x)


def _cpu_unsupported_reason(x: Activations) -> str | None:
    if native.UNAVAILABLE_REASON is not None:
        return native.UNAVAILABLE_REASON
    if x.device.type != "cpu":
        return f"the tensors are on {x.device}, not on a CPU"
    return None if x.dtype in _CPU_DTYPES else _dtype_reason(_CPU_DTYPES, x.dtype)


def _cuda_unsupported_reason(operation: str, x: Activations) -> str | None:
    if native.UNAVAILABLE_REASON is not None:
        return native.UNAVAILABLE_REASON
    cross_entropy = operation == "linear_cross_entropy"
    kernels = ["cross_entropy"] if cross_entropy else [f"{operation}_forward", f"{operation}_backward"]
    if not all(native.has_kernel(f"cuda_{kernel}", x.device) for kernel in kernels):
        reason = cuda_build.unsupported_reason(operation)
        return reason or f"the tensors are on {x.device}, not on a GPU"
    supported = _GPU_DTYPES[1:] if operation == "attention" else _GPU_DTYPES
    if x.dtype not in supported:
        return _dtype_reason(supported, x.dtype)
    if not x.is_cuda or torch.compiler.is_compiling():
        return None
    return cuda_build.unsupported_gpu_reason(operation, x.device)


def _triton_unsupported_reason(x: Activations) -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed: pip install triton"
    if x.dtype not in _GPU_DTYPES:
        return _dtype_reason(_GPU_DTYPES, x.dtype)
    if not x.is_cuda:
        return None if x.device.type == "cpu" and _INTERPRETED else f"the tensors are on {x.device}, not on a GPU"
    if torch.version.hip:
        return "its kernels are for NVIDIA GPUs, and this PyTorch is built for ROCm"
    if torch.compiler.is_compiling():  # the GPU cannot be queried, and the compiler has its own minimum
        return None
    return _old_gpu_reason(torch.cuda.get_device_capability(x.device))


def _old_gpu_reason(capability: tuple[int, int]) -> str | None:
    if capability >= (8, 0):
        return None
    return "its kernels require a GPU of sm_80 or later, this one is sm_{}{}".format(*capability)


def gemm_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype in which PyTorch multiplies these: autocast's if it is enabled, else their common dtype."""
    return autocast_dtype(x.device) or torch.promote_types(x.dtype, weight.dtype)
