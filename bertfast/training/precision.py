"""Where a program computes, and in which precision."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]


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


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products; a processor without them is many times slower in bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_precision(device: torch.device, wanted: Precision = "auto") -> Literal["fp32", "bf16"]:
    """fp32 or bf16: what is wanted, or with "auto" what the device multiplies natively."""
    if wanted == "auto":
        return "bf16" if multiplies_bf16(device) else "fp32"
    if wanted not in ("fp32", "bf16"):
        raise ValueError(f"precision must be auto, fp32 or bf16, got {wanted!r}")
    return wanted


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """bf16 products with fp32 parameters, or nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
