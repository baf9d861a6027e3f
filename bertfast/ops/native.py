"""The compiled library of `csrc/`, where it was built: its operations, and which instructions they use.

Its operations are `torch.ops.bertfast.cpu_<launcher>`, and where nvcc was there `cuda_<launcher>`, with the arguments
and results of Triton's launchers. Without it everything still runs, in plain PyTorch.
"""

from __future__ import annotations

import importlib
import struct
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal, get_args

import torch

from bertfast.kernels.contracts import CONTRACTS
from bertfast.kernels.operation import define

InstructionSet = Literal["plain", "avx2", "avx512", "avx512_bf16"]
"""Any processor's, and those of x86-64: 256 bits; 512; 512 with products of bf16 pairs."""


# Only Triton has the first; the second is made of GEMMs and `cross_entropy`, see `linear_cross_entropy_native.py`.
_WITHOUT_KERNEL = {"linear_gelu_forward", "linear_cross_entropy_forward"}


def _load() -> str | None:
    """Define the library's operations and load their kernels; return why not, if that cannot be done."""
    found = PathFinder.find_spec("bertfast._C", [str(Path(__file__).parents[1])])  # not that of an editable install
    if found is None:
        return "the compiled library was not built: install bertfast again with a C++20 compiler"
    for implementation in ("cpu", "cuda"):
        for name in CONTRACTS.keys() - _WITHOUT_KERNEL:
            define(implementation, name)
    try:
        if not _is_whole(Path(found.origin)):
            raise ImportError(f"{found.origin} is cut off")
        importlib.import_module("bertfast._C")
    except ImportError as error:
        reason = f"the compiled library does not load, install bertfast again ({error})"
        warnings.warn(f"bertfast: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    return None


def _is_whole(path: Path) -> bool:
    """Whether a file of Linux's format reaches to its end, the table of sections; loading another ends the process."""
    with path.open("rb") as library:
        header = library.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return len(header) == 64
    (table,), (size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return table + size * count <= path.stat().st_size


UNAVAILABLE_REASON: str | None = _load()
"""Why there is no compiled library; None where there is one."""

_HAS = torch._C._dispatch_has_kernel_for_dispatch_key
_KERNELS = {  # asked now: torch.compile would trace the question
    (name.removeprefix("bertfast::"), device)
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith(("bertfast::cpu_", "bertfast::cuda_"))
    for device in ("cpu", "cuda")
    if _HAS(name, device.upper())
}


def has_kernel(kernel: str, device: torch.device) -> bool:
    """Return whether the library has a kernel for tensors on such a device; see `cuda_build` for why not on a GPU."""
    return (kernel, device.type) in _KERNELS


def path() -> Path:
    """Where the library is, if there is one."""
    return Path(sys.modules["bertfast._C"].__file__)


def instruction_set() -> InstructionSet:
    """The instructions that the kernels use: the best that the processor has, unless others were asked for."""
    return get_args(InstructionSet)[torch.ops.bertfast.instruction_set()]


def instruction_sets() -> list[InstructionSet]:
    """Those that the kernels can use on this processor; none without the library."""
    if UNAVAILABLE_REASON is not None:
        return []
    known = get_args(InstructionSet)
    return [name for number, name in enumerate(known) if torch.ops.bertfast.has_instruction_set(number)]


def use_instruction_set(name: InstructionSet) -> None:
    """From now on use these instructions.

    Raises:
        ValueError: there is no library or no such set, or the processor does not have it.
    """
    if UNAVAILABLE_REASON is not None:
        raise ValueError(f"instruction set {name!r}: {UNAVAILABLE_REASON}")
    known = get_args(InstructionSet)
    if name not in known:
        raise ValueError(f"instruction set must be one of {', '.join(known)}, got {name!r}")
    if name not in instruction_sets():
        raise ValueError(f"this processor has no instruction set {name!r}; {instruction_set()!r} stays in use")
    torch.ops.bertfast.use_instruction_set(known.index(name))
