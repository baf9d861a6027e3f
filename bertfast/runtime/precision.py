"""Device and precision of a program's computations."""

from __future__ import annotations

import contextlib
import time
from functools import cache
from typing import Literal, Protocol

import torch

from bertfast.ops import native
from bertfast.ops.attention import HEAD_DIMENSIONS
from bertfast.ops.matmul import linear
from bertfast.runtime.torch_compat import cpu_has_bf16_gemm

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Precision = Literal["auto", "fp32", "bf16", "fp16"]
InferencePrecision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
ChosenPrecision = Literal["fp32", "bf16", "fp16", "int8"]
ResidualPrecision = Literal["fp32", "bf16"]


class ModelConfig(Protocol):
    """Sizes that determine the head dimension."""

    hidden_size: int
    num_attention_heads: int


def choose_device(name: str | None = None) -> torch.device:
    """Return the named device; None: a GPU if one is available, else the CPU.

    Raises:
        ValueError: There is no such device, or it is not available.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not available: {str(error).splitlines()[0]}") from None
    return device


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished all queued work, so that a clock can be read; a CPU has no queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def has_bf16_gemm(device: torch.device) -> bool:
    """Return whether the device has instructions for bf16 GEMMs; a CPU without them is many times slower in bf16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu_has_bf16_gemm()


def choose_precision(
    device: torch.device, precision: InferencePrecision = "auto", config: ModelConfig | None = None
) -> ChosenPrecision:
    """Return the precision to compute in.

    Args:
        device: Device to compute on.
        precision: Requested precision. auto: bf16 if the device has native bf16 GEMMs and, on a CPU, they are faster
            than in fp32, which is measured once, in half a second; else fp32, as without kernels for 16 bits. A
            quantised model runs in int8.
        config: Configuration of the model, whose head dimension may have no kernels; None: it has.

    Raises:
        ValueError: int8 does not run here.
    """
    if precision == "auto" and getattr(config, "quantization_config", None) is not None:
        precision = "int8"
    if precision == "int8":
        _require_int8(device)
    if precision != "auto":
        return precision
    has_kernels = config is None or config.hidden_size // config.num_attention_heads in HEAD_DIMENSIONS
    if not has_kernels or not has_bf16_gemm(device):
        return "fp32"
    is_faster = device.type == "cuda" or (native.UNAVAILABLE_REASON is None and _bf16_is_faster())
    return "bf16" if is_faster else "fp32"


def _require_int8(device: torch.device) -> None:
    if device.type != "cpu":
        raise ValueError(f"int8 runs on a CPU, not on {device}: add --device cpu, or choose another --precision")
    if native.UNAVAILABLE_REASON is not None:
        raise ValueError(
            f"int8 requires the native library ({native.UNAVAILABLE_REASON}): choose another --precision or model"
        )


def half(precision: str) -> torch.dtype:
    """Return the dtype of GEMMs in a precision."""
    return _HALVES.get(precision, torch.float32)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Return a context in which GEMMs run in 16 bits while parameters stay fp32; for fp32 it changes nothing."""
    return torch.autocast(device.type, _HALVES.get(precision, torch.bfloat16), enabled=precision in _HALVES)


class NotFiniteError(ValueError):
    """A model computes NaN or infinite values.

    Args:
        model: Folder or name of the model.

    Attributes:
        problem: What is wrong, without what to do about it.
    """

    def __init__(self, model: str):
        self.problem = "the model's outputs are not finite"
        super().__init__(
            f"the outputs of {model} are not finite: its weights are too large, or --precision fp16 cannot hold its "
            "hidden states; use another model, or --precision fp32"
        )


def require_finite(outputs: torch.Tensor, model: str | None) -> None:
    """Raise NotFiniteError if a value that a model computed is NaN or infinite.

    Args:
        outputs: The values.
        model: Folder or name of the model, if it has one.
    """
    if not outputs.isfinite().all():
        raise NotFiniteError(model or "the model")


@cache
def _bf16_is_faster(budget: float = 0.5) -> bool:
    """Return whether a layer's GEMM is faster in bf16 than in fp32 on this CPU, measured in `budget` seconds."""
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    operands = {dtype: (torch.randn(512, 768, dtype=dtype), torch.randn(3072, 768, dtype=dtype)) for dtype in best}
    end = time.perf_counter() + budget
    while time.perf_counter() < end:
        for dtype, (x, weight) in operands.items():
            started = time.perf_counter()
            linear(x, weight)
            best[dtype] = min(best[dtype], time.perf_counter() - started)
    return best[torch.bfloat16] < best[torch.float32]
