"""`bertfast doctor`: what this machine has, and what runs on it by default, and why."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bertfast import compiled, cuda_build
from bertfast.ops import __all__ as OPERATIONS
from bertfast.ops.attention import HEAD_DIMENSIONS
from bertfast.ops.choice import HAS_TRITON, choose, why_not
from bertfast.precision import choose_device, choose_precision, multiplies_bf16
from bertfast.products import onednn_is_faster

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(kw_only=True)
class DoctorSettings:
    """What to look at.

    Attributes:
        device: The device that training would use, cpu, cuda, cuda:1, …; none: a GPU if there is one.
    """

    device: str | None = None


def doctor(settings: DoctorSettings) -> None:
    """Print it."""
    device = choose_device(settings.device)
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    facts = {
        "versions": ", ".join(f"{name} {_version(name)}" for name in ("bertfast", "torch", "triton")),
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "processor": f"{_processor()}; {torch.get_num_threads()} threads, {os.cpu_count()} processors",
        "library": _library(),
        **({} if compiled.ABSENT else {"CUDA C++": cuda_build.summary()}),
        "GPUs": "; ".join(map(_gpu, devices[1:])) or "none",
        "products": f"of fp32 on a CPU by {'oneDNN, which is faster here' if onednn_is_faster() else 'MKL'}",
        "training": f"on {device} in {_precision(device)}",
    }
    print("\n".join(f"{name:11}{what}" for name, what in facts.items()), end="\n\n")
    print("\n".join(_table(devices)))
    advice = _advice(device)
    if advice:
        print("\nFaster would be:", *advice, sep="\n  ")


def _advice(device: torch.device) -> list[str]:
    """What would make it faster here."""
    advice = []
    if compiled.ABSENT is not None:
        advice.append("the compiled library: install bertfast again where a C++ compiler is")
    if device.type == "cuda":
        if not HAS_TRITON:
            advice.append("Triton, whose kernels are the GPU's: pip install triton")
        return advice
    if torch.get_num_threads() < (os.cpu_count() or 1) // 2:
        advice.append(f"more threads: OMP_NUM_THREADS or a limit leaves {torch.get_num_threads()} of {os.cpu_count()}")
    if compiled.ABSENT is None and compiled.instruction_set() == "plain":
        advice.append("a processor with AVX2 or AVX-512, whose vectors the kernels use")
    advice.append("a GPU of sm_80 or later" if not torch.cuda.is_available() else "the GPU that is here: --device cuda")
    return advice


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    description = Path("/proc/cpuinfo")
    lines = description.read_text().splitlines() if description.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _library() -> str:
    if compiled.ABSENT is not None:
        return f"none: {compiled.ABSENT}"
    sets = ", ".join(compiled.instruction_sets())
    return f"{compiled.path()}; instruction sets {sets}; {compiled.instruction_set()} in use"


def _gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return f"{device} {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"


def _precision(device: torch.device) -> str:
    chosen = choose_precision(device)
    if not multiplies_bf16(device):
        return f"{chosen}: it has no instructions for products of bf16"
    return chosen if device.type == "cuda" else f"{chosen}: measured, the faster one here"


def _table(devices: list[torch.device]) -> list[str]:
    """The operations, a line each, with what runs them by default; then why it is not the kernels, where it is not."""
    columns = {
        f"{device} {name}": torch.empty(0, dtype=dtype, device=device)
        for device in devices
        for name, dtype in _DTYPES.items()
    }
    rows = [[name, *(choose(name, None, x) for x in columns.values())] for name in OPERATIONS]
    rows.insert(0, ["operation", *columns])
    lines = [f"{name:22}" + "".join(f"{word:12}" for word in words).rstrip() for name, *words in rows]
    lines.append(f"attention with heads of other sizes than {', '.join(map(str, HEAD_DIMENSIONS))}: reference")
    for column, x in columns.items():
        refusal = why_not("triton" if x.is_cuda else "cpu", "attention", x)
        if refusal is not None:
            lines.append(f"{column}: reference, which is plain PyTorch: {refusal}")
    return lines
