"""What every operation shares: the names of the implementations, and the choice of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from bertfast.ops import cuda_build, native
from bertfast.runtime.torch_compat import autocast_dtype, is_transformed

Implementation = Literal["reference", "cpu", "triton", "cuda"]
"""Plain PyTorch, the compiled library, Triton, or CUDA C++ for Hopper."""


HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON:  # importing them registers their launchers
    from bertfast.kernels import (  # noqa: F401
        add_layer_norm,
        attention,
        attention_backward,
        bias_gelu,
        embed,
        gelu_layer_norm,
        linear_cross_entropy,
        linear_gelu,
        sum_by_index,
    )
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs kernels on CPU tensors, for tests


def choose(operation: str, requested: Implementation | None, x: Tensor, refusal: str | None = None) -> Implementation:
    """The implementation for tensors like `x`: the one requested, else the fastest that can, else the reference.

    That is Triton on a GPU and the compiled library on a CPU. `refusal` says why the operation's kernels cannot take
    these arguments, if so. A request that cannot be met is an error, never another implementation.
    """
    if requested is None:
        fastest = "triton" if x.is_cuda else "cpu"
        return fastest if why_not(fastest, operation, x) is None and refusal is None else "reference"
    if requested not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"{operation}: implementation must be one of {known}, got {requested!r}")
    refusal = why_not(requested, operation, x) or (None if requested == "reference" else refusal)
    if refusal is not None:
        remedy = "pass implementation='reference', which takes any tensors"
        raise ValueError(f"{operation}: no {requested!r} implementation here: {refusal}; {remedy}")
    return requested


def float64_among(*tensors: Tensor | None) -> str | None:
    """Return why no kernel takes these tensors if one is float64, whatever dtype the others have; else None."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return "its kernels take no float64"
    return None


def run(function: type[torch.autograd.Function], *arguments):
    """function.apply(*arguments), or its forward alone where no gradient is asked for: a short sentence notices."""
    if torch.compiler.is_compiling():
        return function.apply(*_distinct(arguments))
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_Forgetful(), *arguments)


def _distinct(arguments: tuple) -> list:
    # torch.compile does not trace a Function of which two arguments are one tensor.
    result: list = []
    for argument in arguments:
        if isinstance(argument, Tensor) and any(argument is other for other in result):
            argument = argument.view_as(argument)
        result.append(argument)
    return result


class _Forgetful:
    """The context of a forward pass that no backward pass will follow."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def launcher(implementation: Implementation, name: str) -> Callable:
    """The launcher `name` of an implementation other than the reference, as an operation of torch."""
    return getattr(torch.ops.bertfast, f"{implementation}_{name}")


def why_not(implementation: Implementation, operation: str, x: Tensor) -> str | None:
    """Why an implementation cannot run `operation` on tensors like `x`; None if it can."""
    if implementation == "reference":
        return None
    if is_transformed():
        return "torch.func and forward-mode differentiation work through the reference alone"
    if implementation == "triton":
        return _triton_refusal(x)
    if implementation == "cpu":
        return _cpu_refusal(x)
    return _cuda_refusal(operation, x)


def _cpu_refusal(x: Tensor) -> str | None:
    if native.ABSENT is not None:
        return native.ABSENT
    if x.device.type != "cpu":
        return f"the tensors are on {x.device}, not on a CPU"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"its kernels take float32 and bfloat16, got {x.dtype}"
    return None


def _cuda_refusal(operation: str, x: Tensor) -> str | None:
    if native.ABSENT is not None:
        return native.ABSENT
    cross_entropy = operation == "linear_cross_entropy"
    kernels = ["cross_entropy"] if cross_entropy else [f"{operation}_forward", f"{operation}_backward"]
    if not all(native.runs(f"cuda_{kernel}", x.device) for kernel in kernels):
        reason = cuda_build.unsupported_reason(operation)
        return reason or f"the tensors are on {x.device}, not on a GPU"
    if x.dtype not in (torch.bfloat16, torch.float16, *([] if operation == "attention" else [torch.float32])):
        return f"its kernels take {'' if operation == 'attention' else 'float32, '}bfloat16 and float16, got {x.dtype}"
    if not x.is_cuda or torch.compiler.is_compiling():
        return None
    return cuda_build.unsupported_gpu_reason(operation, x.device)


def _triton_refusal(x: Tensor) -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed: pip install triton"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels take float32, bfloat16 and float16, got {x.dtype}"
    if not x.is_cuda:
        return None if x.device.type == "cpu" and _INTERPRETED else f"the tensors are on {x.device}, not on a GPU"
    if torch.version.hip:
        return "its kernels are for NVIDIA GPUs, and this PyTorch is built for ROCm"
    if torch.compiler.is_compiling():  # where no one can ask the GPU, and the compiler has a bound of its own
        return None
    return _too_old(torch.cuda.get_device_capability(x.device))


def _too_old(capability: tuple[int, int]) -> str | None:
    return (
        None
        if capability >= (8, 0)
        else "its kernels need a GPU of sm_80 or later, this one is sm_{}{}".format(*capability)
    )


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that PyTorch would multiply these in: autocast's where that is on, else their own."""
    return autocast_dtype(x.device) or torch.promote_types(x.dtype, weight.dtype)
