"""Where a program computes, and in which precision."""

from __future__ import annotations

import contextlib
import time
from functools import cache
from typing import Literal

import torch

from bertfast.ops.matmul import linear
from bertfast.runtime.torch_compat import cpu_has_bf16_gemm

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Precision = Literal["auto", "fp32", "bf16", "fp16"]
ResidualPrecision = Literal["fp32", "bf16"]


def choose_device(name: str | None = None) -> torch.device:
    """The device named, else a GPU if there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not to be had here: {str(error).splitlines()[0]}") from None
    return device


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given, so that a clock can be read; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def has_bf16_gemm(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products; a processor without them is many times slower in bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_has_bf16_gemm()


def choose_precision(device: torch.device, wanted: Precision = "auto") -> Literal["fp32", "bf16", "fp16"]:
    """fp32, bf16 or fp16: what is wanted, or with "auto" bf16 where the device multiplies it natively and faster.

    A GPU's bf16 is; on a CPU that is measured, once, in half a second.
    """
    if wanted == "auto":
        return "bf16" if has_bf16_gemm(device) and (device.type == "cuda" or _bf16_is_faster()) else "fp32"
    if wanted not in ("fp32", *_HALVES):
        raise ValueError(f"precision must be auto, fp32, bf16 or fp16, got {wanted!r}")
    return wanted


def half(precision: str) -> torch.dtype:
    """The dtype of a precision's products."""
    return _HALVES.get(precision, torch.float32)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Products in half precision with fp32 parameters, or nothing for fp32."""
    return torch.autocast(device.type, _HALVES.get(precision, torch.bfloat16), enabled=precision in _HALVES)


@cache
def _bf16_is_faster(budget: float = 0.5) -> bool:
    """Whether this CPU takes less time for a layer's product in bf16 than in fp32, measured in `budget` seconds."""
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    operands = {dtype: (torch.randn(512, 768, dtype=dtype), torch.randn(3072, 768, dtype=dtype)) for dtype in best}
    end = time.perf_counter() + budget
    while time.perf_counter() < end:
        for dtype, (x, weight) in operands.items():
            started = time.perf_counter()
            linear(x, weight)
            best[dtype] = min(best[dtype], time.perf_counter() - started)
    return best[torch.bfloat16] < best[torch.float32]
