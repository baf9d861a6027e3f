"""Memory that ends at a protected page: an access beyond a tensor's last element crashes the process.

Neither C++ nor the interpreter of Triton notices an access out of bounds: other allocated memory usually follows.
"""

import ctypes
import mmap

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_LIBRARY = ctypes.CDLL(None, use_errno=True)


def guarded(x: Tensor) -> Tensor:
    """Return a contiguous copy of x that ends at a protected page."""
    return _room(x.shape, x.dtype).copy_(x.detach()).requires_grad_(x.requires_grad)


class GuardedMemory(TorchDispatchMode):
    """While this mode is active, guard all memory that is allocated empty: outputs and scratch buffers."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "bertfast":
            with self:  # for allocations inside it; redispatch avoids a recursion
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments)
        result = function(*arguments, **(options or {}))
        if "empty" not in function.overloadpacket.__name__ or not result.is_contiguous():
            return result
        return _room(result.shape, result.dtype)


def _room(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    size = shape.numel() * dtype.itemsize
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
    if _LIBRARY.mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0):  # no access
        raise OSError(ctypes.get_errno(), "mprotect failed")
    offset = pages * mmap.PAGESIZE - size
    return torch.frombuffer(memory, dtype=dtype, count=shape.numel(), offset=offset).view(shape)  # keeps `memory`
