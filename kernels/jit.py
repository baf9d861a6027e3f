"""How a kernel is compiled: `triton.jit` without the specialisations that would compile anew for each batch."""

import inspect
from collections.abc import Callable

import triton
import triton.language as tl


def kernel(function: Callable | None = None, *, specialize: tuple[str, ...] = ()) -> Callable:
    """Compile the decorated function as a Triton kernel that serves batches of all sizes.

    Left to itself, Triton compiles a kernel again for an integer argument that is 1, or that is divisible by 16 where
    another was not: numbers of tokens and of sequences would do that every few batches, and an integer of 1 becomes a
    Python int, which has no methods of a tensor. Strides profit from it, by wider loads, and are the same for all
    batches.

    Args:
        function: The kernel. Parameters named `…_ptr` and `…_stride` are specialised on, and constants are constants.
        specialize: Further parameters to specialise on: those that tensors' rows are apart under another name.
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
