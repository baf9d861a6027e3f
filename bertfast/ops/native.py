"""The native library of `csrc/`, which is optional: its operators, and the instruction sets that they use.

It implements `torch.ops.bertfast.cpu_<name>` and, if it was built with nvcc, `torch.ops.bertfast.cuda_<name>`, with the
arguments and results of Triton's operators. Without it everything runs in plain PyTorch.
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
from bertfast.runtime.torch_compat import registered_kernels

InstructionSet = Literal["plain", "avx2", "avx512", "avx512_bf16"]
"""The baseline of a CPU; on x86-64 also 256 bits, 512 bits, and 512 bits with dot products of bf16 pairs."""


# Only Triton has the first; the second is built from GEMMs and `cross_entropy` in `linear_cross_entropy_native.py`.
_WITHOUT_KERNEL = {"linear_gelu_forward", "linear_cross_entropy_forward"}


def _load() -> str | None:
    """Define the library's operators and load their kernels; return why that is impossible, or None."""
    package = Path(__file__).parents[1]
    found = PathFinder.find_spec("bertfast._C", [str(package)])  # not that of an editable install
    if found is None or found.origin is None:
        return "the native library was not built: install bertfast again with a C++20 compiler"
    for implementation in ("cpu", "cuda"):
        for name in CONTRACTS.keys() - _WITHOUT_KERNEL:
            define(implementation, name)
    try:
        if not _is_complete(Path(found.origin)):
            raise ImportError(f"{found.origin} is truncated")
        importlib.import_module("bertfast._C")
    except ImportError as error:
        reason = f"the native library does not load, install bertfast again ({error})"
        warnings.warn(f"bertfast: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    return None


def _is_complete(path: Path) -> bool:
    """Return whether an ELF file extends to the end of its section table: loading a truncated one ends the process."""
    with path.open("rb") as library:
        header = library.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return len(header) == 64
    (table,), (size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return bool(table + size * count <= path.stat().st_size)


UNAVAILABLE_REASON: str | None = _load()
"""Why there is no native library; None if it is loaded."""

_KERNELS = registered_kernels(("cpu_", "cuda_"))  # queried once, at import: torch.compile would trace the query


def has_kernel(name: str, device: torch.device) -> bool:
    """Return whether the library has a kernel, such as "cpu_bias_gelu_forward", for tensors on such a device.

    `cuda_build` says why one for a GPU is missing.
    """
    return (name, device.type) in _KERNELS


def path() -> Path:
    """Return the file of the library, which must be loaded."""
    file = sys.modules["bertfast._C"].__file__
    assert file is not None
    return Path(file)


def instruction_set() -> InstructionSet:
    """Return the instruction set in use: the best one of this CPU unless `use_instruction_set` selected another."""
    known: tuple[InstructionSet, ...] = get_args(InstructionSet)
    index: int = torch.ops.bertfast.instruction_set()
    return known[index]


def instruction_sets() -> list[InstructionSet]:
    """Return the instruction sets that the kernels can use on this CPU; none without the library."""
    if UNAVAILABLE_REASON is not None:
        return []
    known = get_args(InstructionSet)
    return [name for index, name in enumerate(known) if torch.ops.bertfast.has_instruction_set(index)]


def use_instruction_set(name: InstructionSet) -> None:
    """Use an instruction set from now on.

    Raises:
        ValueError: The library is not available, or the CPU does not support the instruction set.
    """
    if UNAVAILABLE_REASON is not None:
        raise ValueError(f"instruction set {name!r}: {UNAVAILABLE_REASON}")
    known = get_args(InstructionSet)
    if name not in known:
        raise ValueError(f"instruction set must be one of {', '.join(known)}, got {name!r}")
    if name not in instruction_sets():
        raise ValueError(f"this CPU does not support the instruction set {name!r}; {instruction_set()!r} stays in use")
    torch.ops.bertfast.use_instruction_set(known.index(name))
