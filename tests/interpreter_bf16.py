"""Repairs of Triton's interpreter, versions 3.6 and 3.7, which keeps bf16 as 16-bit integers and computes with those.

Matmuls, arithmetic, casts and sums are done in fp32 on the numbers that the bits mean, and rounded to the nearest.
"""

from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Handle, _Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder


def repair() -> None:
    """Make the interpreter right about bf16, for the rest of the process."""
    _Builder.create_dot = _dot(_Builder.create_dot)
    _Builder.binary_op = _binary(_Builder.binary_op)
    _Builder.cast_impl = _cast(_Builder.cast_impl)
    _Builder.create_fp_to_fp = _cast(_Builder.create_fp_to_fp)
    _Builder.get_bf16 = lambda self, value: _Handle(_bits(np.array([value], np.float32)), tl.bfloat16)
    interpreter.ReduceOps.sum = _sum(interpreter.ReduceOps.sum)


def _numbers(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _bits(numbers: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounded = ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _dot(broken: Callable) -> Callable:
    def raised(handle):
        return _Handle(_numbers(handle.data), tl.float32) if _is_bf16(handle) else handle

    return lambda self, a, b, d, *rest: broken(self, raised(a), raised(b), d, *rest)


def _binary(broken: Callable) -> Callable:
    def binary_op(self, left, right, function):
        if not (_is_bf16(left) and _is_bf16(right)):
            return broken(self, left, right, function)
        result = function(_numbers(left.data), _numbers(right.data))
        return _Handle(result, tl.int1) if result.dtype == bool else _Handle(_bits(result), tl.bfloat16)

    return binary_op


def _cast(broken: Callable) -> Callable:
    def cast(self, source, target, *rest):
        scalar = target.scalar
        if _is_bf16(source) == (scalar == tl.bfloat16):
            return broken(self, source, target, *rest)
        if scalar == tl.bfloat16:
            return _Handle(_bits(source.data.astype(np.float32)), scalar)
        return _Handle(_numbers(source.data).astype(interpreter._get_np_dtype(scalar)), scalar)

    return cast


def _sum(broken: Callable) -> Callable:
    def sum_of(self, x):
        if not _is_bf16(x.handle):
            return broken(self, x)
        total = broken(self, self.to_tensor(_numbers(x.handle.data), tl.float32))
        return self.to_tensor(_bits(total.handle.data), tl.bfloat16)

    return sum_of
