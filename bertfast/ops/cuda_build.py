"""The record of how the CUDA kernels of the native library were built, and whether this machine can run them.

setup.py writes the record next to the library. `bertfast doctor` shows it, and the error for an unsupported
`implementation="cuda"` quotes the relevant part.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from bertfast.ops import native

SOURCES = {  # operation: the files in csrc/cuda with its kernels
    "attention": ("attention", "attention_backward"),
    "add_layer_norm": ("add_layer_norm",),
    "bias_gelu": ("bias_gelu",),
    "gelu_layer_norm": ("gelu_layer_norm",),
    "linear_cross_entropy": ("cross_entropy",),
}
_RECORD = "_C.cuda.json"
_NO_RECORD = "the library has no record of its CUDA kernels: install bertfast again"


@dataclass(frozen=True)
class CudaBuild:
    """The record that setup.py wrote.

    Attributes:
        nvcc: Version of nvcc; None if it was not found.
        reason: Why the library has no CUDA kernels and what to do; None if it has some.
        architectures: By file of csrc/cuda, the targets for which it was compiled: "80", "90a", "120+PTX", ….
        missing: By file that is not in the library, "error": the reason and what to do; "output": nvcc's output.
        slow: By file, ptxas' warnings of spilled registers and serialised wgmma.
        commit: Commit of the checkout from which the library was built, "-dirty" with uncommitted changes; empty if it
            is not known.
    """

    nvcc: str | None
    reason: str | None
    architectures: dict[str, list[str]]
    missing: dict[str, dict[str, str]]
    slow: dict[str, list[str]]
    commit: str = ""


def _read() -> tuple[CudaBuild, Path] | None:
    """Return the record and its path; None if there is none, as for a library that the tests built."""
    if native.UNAVAILABLE_REASON is not None:
        return None
    path = native.path().with_name(_RECORD)
    if not path.is_file():
        return None
    return CudaBuild(**json.loads(path.read_text(encoding="utf-8"))), path


_FOUND = _read()  # at import: torch.compile would trace it
BUILD: CudaBuild | None = _FOUND[0] if _FOUND else None


def unsupported_reason(operation: str) -> str | None:
    """Return why the library has no CUDA kernels for an operation, and what to do; None if it should have them."""
    if operation not in SOURCES:
        return f"it has no kernel for {operation}"
    if BUILD is None:
        return _NO_RECORD
    if BUILD.reason is not None:
        return f"the CUDA kernels were not built: {BUILD.reason}"
    missing = [source for source in SOURCES[operation] if source in BUILD.missing]
    return f"{missing[0]}.cu was not built: {BUILD.missing[missing[0]]['error']}" if missing else None


def unsupported_gpu_reason(operation: str, device: torch.device) -> str | None:
    """Return why a GPU or its driver cannot run the library's kernels for an operation; None if they can."""
    if BUILD is None:
        return None
    if (reason := driver_reason()) is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    for source in SOURCES[operation]:
        targets = BUILD.architectures.get(source, [])
        if not any(runs_on(target, capability) for target in targets):
            return f"its kernels are compiled for {_listed(targets)}, this GPU is sm_{capability[0]}{capability[1]}"
    return None


def runs_on(target: str, capability: tuple[int, int]) -> bool:
    """Return whether a GPU runs code for a target.

    It runs code for its own major version up to its minor version, and older PTX; "90a" runs on sm_90 only.
    """
    architecture, _, ptx = target.partition("+")
    major, minor = divmod(int(architecture.rstrip("af")), 10)
    if architecture.endswith("a"):
        return (major, minor) == capability
    same_major = major == capability[0] and minor <= capability[1]
    return same_major or (ptx == "PTX" and not architecture.endswith("f") and (major, minor) <= capability)


def driver_reason() -> str | None:
    """Return why the driver cannot run the kernels: CUDA's major version is older than nvcc's. None if it can."""
    driver = driver_cuda_version()
    if BUILD is None or BUILD.nvcc is None or driver is None or int(BUILD.nvcc.split(".")[0]) <= driver[0]:
        return None
    major = BUILD.nvcc.split(".")[0]
    return (
        f"its kernels were built with nvcc {BUILD.nvcc}, and the driver is for CUDA {driver[0]}.{driver[1]} (PyTorch: "
        f"CUDA {torch.version.cuda}): update the driver to one for CUDA {major}, or install bertfast again with nvcc "
        f"{driver[0]} (NVCC=/path/to/nvcc)"
    )


@functools.cache
def driver_cuda_version() -> tuple[int, int] | None:
    """Return the newest CUDA that the driver supports, as (major, minor); None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def summary() -> str:
    """Return a sentence for `bertfast doctor`: the build, missing files, and versions that do not match."""
    if BUILD is None or _FOUND is None:
        return _NO_RECORD
    if BUILD.reason is not None:
        return f"not built: {BUILD.reason}"
    targets = {target for built in BUILD.architectures.values() for target in built}
    parts = [f"built with nvcc {BUILD.nvcc} for {_listed(sorted(targets, key=_sort_key))}"]
    parts += [
        f"{source}.cu was not built: {why['error']} (all output: {_FOUND[1]})" for source, why in BUILD.missing.items()
    ]
    parts += [f"{source}.cu is slower than it should be: {lines[0]}" for source, lines in BUILD.slow.items()]
    if torch.version.cuda and BUILD.nvcc and torch.version.cuda.split(".")[0] != BUILD.nvcc.split(".")[0]:
        parts.append(f"PyTorch has CUDA {torch.version.cuda}, another major version than nvcc's")
    if (reason := driver_reason()) is not None:
        parts.append(reason)
    return "; ".join(parts)


def _sort_key(target: str) -> tuple[int, str]:
    return int(re.split(r"\D", target)[0]), target


def _listed(targets: list[str]) -> str:
    """Return targets as text: "sm_80, sm_90a, sm_120 with PTX for later GPUs"."""
    return ", ".join(f"sm_{target}".replace("+PTX", " with PTX for later GPUs") for target in targets) or "no GPU"
