"""`triton.jit` without the specialisations that would recompile a kernel for each batch."""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

TRITON_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


def kernel(function: Callable[..., None] | None = None, *, specialize: tuple[str, ...] = ()) -> Any:
    """Compile the decorated function as a Triton kernel that serves batches of all sizes.

    By default Triton recompiles a kernel if an integer argument is 1, or if its divisibility by 16 changes: the number
    of tokens or sequences would cause that every few batches, and a 1 becomes a Python int, which lacks a tensor's
    methods. Strides benefit from specialisation, by wider loads, and are the same for all batches.

    Args:
        function: The kernel. Triton specialises on its parameters named `…_ptr` and `…_stride`, and its constexpr ones.
        specialize: Further parameters to specialise on: row strides under another name.
    """
    if function is None:
        return lambda function: kernel(function, specialize=specialize)
    at_run_time = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation is not tl.constexpr
        and not name.endswith(("_ptr", "_stride"))
        and name not in specialize
    ]
    return triton.jit(function, do_not_specialize=at_run_time)
