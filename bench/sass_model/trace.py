"""Record what code would launch on a GPU, with the sizes of its tensors, on a machine without one.

Tensors are fake: they have shapes and dtypes, and nothing is computed. They claim to be on a GPU, so the code takes the
path of a GPU; Triton's kernels are recorded where they would be launched.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import JITFunction

from bench.sass_model.constants import H200, MULTI_TENSOR_CHUNK
from bertfast.kernels import rows as row_kernels
from bertfast.runtime import torch_compat

_FREE = (
    *("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "lift_fresh", "device", "promote_types"),
    *("scalar_tensor", "_record_function_enter_new", "_record_function_exit"),  # on the host
)
_WRITE_ONLY = ("zero_", "_foreach_zero_", "fill_", "copy_")  # they do not read what they overwrite
MULTI_TENSOR = ("_foreach_", "_fused_")
"""Prefixes of operators on lists of tensors, of which a launch takes many."""

_GATHERS = ("index_select", "index", "embedding", "gather")  # they read as much of the first tensor as they write


_LAUNCH_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")  # Triton's own


@dataclass(frozen=True)
class Call:
    """A library operator, or a launch of a Triton kernel.

    Attributes:
        name: Name of the operator, such as "mm", or of the kernel.
        operator: The operator of bertfast that called it; "" if none did.
        is_kernel: Whether it is a Triton kernel. What it writes is not known, so all its tensors count as read.
        reads: Bytes of its inputs, each element once.
        writes: Bytes of its results.
        rows: Rows of its first tensor; of an operator, the largest number of rows of a tensor.
        element: Bytes of an element of its first tensor; 0: it reads none.
        blocks: Blocks of a kernel along the first dimension of its grid.
        chunks: Blocks of an operator on a list of tensors.
        gemm: (M, N, K) of a matrix multiplication, else None.
    """

    name: str
    operator: str
    is_kernel: bool
    reads: int
    writes: int
    rows: int = 0
    element: int = 0
    blocks: int = 0
    chunks: int = 0
    gemm: tuple[int, int, int] | None = None


class _CallLog(TorchDispatchMode):
    """Records operators, those inside of bertfast's included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.operator = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "bertfast":
            outer, self.operator = self.operator, func._schema.name.removeprefix("bertfast::triton_")
            with self:
                result = func._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
            self.operator = outer
            return result
        result = func(*args, **kwargs)
        if not _is_free(func):
            self.calls.append(_library_call(func, args, kwargs, result, self.operator))
        return result

    def launch(
        self, kernel: JITFunction[Any], grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Record the launch of a Triton kernel.

        Raises:
            TypeError: It lacks an argument, or has one that the kernel does not take; so it would fail on a GPU, too.
        """
        passed = {name: value for name, value in options.items() if name not in _LAUNCH_OPTIONS}
        inspect.signature(kernel.fn).bind(*arguments, **passed)
        tensors = [x for x in tree_leaves((arguments, passed)) if isinstance(x, Tensor)]
        name, read = kernel.fn.__name__.removesuffix("_kernel"), sum(map(stored_bytes, tensors))
        first = tensors[0]
        self.calls.append(Call(name, self.operator, True, read, 0, len(first), first.element_size(), grid[0]))


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Record the calls in the body of the `with` statement, whose tensors are fake and on a pretended GPU."""
    recorder = _CallLog()

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        recorder.launch(self, grid, arguments, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(Tensor, "is_cuda", property(lambda _: True))
        patch.setattr(torch.cuda, "current_device", lambda: None)  # the index of the tensors' device
        patch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (9, 0))
        patch.setattr(torch_compat, "has_values", lambda _tensor: True)  # modules leave fake tensors to transformers
        patch.setattr(clip_grad, "_has_foreach_support", lambda _tensors, _device: True)  # as on a GPU
        patch.setattr(row_kernels, "sm_count", lambda _device: H200.sms)
        with FakeTensorMode(allow_non_fake_inputs=True), recorder:
            yield recorder.calls


def stored_bytes(x: Tensor) -> int:
    """Return the bytes of a tensor, those of repeated rows once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1
    return elements * x.element_size()


def _is_free(func: Any) -> bool:
    """Return whether an operator launches nothing: it allocates, or returns a view."""
    returns = [one.alias_info for one in func._schema.returns]
    is_view = any(info is not None and not info.is_write for info in returns)
    return is_view or func._schema.name.partition("::")[2] in _FREE


def _library_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, operator: str) -> Call:
    name = func._schema.name.partition("::")[2]
    read: list[Tensor] = []
    written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
        overwritten = argument.alias_info is not None and argument.alias_info.is_write
        if overwritten and not func._schema.returns:
            written += tensors
        if not (overwritten and (argument.is_out or name in _WRITE_ONLY)):
            read += tensors
    writes = sum(map(stored_bytes, written))
    reads = sum(map(stored_bytes, read[1:])) + writes if name in _GATHERS else sum(map(stored_bytes, read))
    rows = max((len(x) for x in (*read, *written) if x.dim()), default=0)
    listed = args[0] if name.startswith(MULTI_TENSOR) else []
    chunks = sum(-(-x.numel() // MULTI_TENSOR_CHUNK) for x in listed)
    element = read[0].element_size() if read else 0
    return Call(name, operator, False, reads, writes, rows, element, chunks=chunks, gemm=_gemm(name, read))


def _gemm(name: str, read: list[Tensor]) -> tuple[int, int, int] | None:
    """Return (M, N, K) of the GEMM of the last two tensors that are read."""
    if name not in ("mm", "addmm", "bmm", "baddbmm"):
        return None
    a, b = read[-2:]
    batch = a.shape[0] if a.dim() == 3 else 1
    return batch * a.shape[-2], b.shape[-1], a.shape[-1]
