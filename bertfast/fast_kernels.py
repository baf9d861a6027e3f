"""Whether a patched model runs packed on the fused kernels, or leaves a call to transformers' own code.

Without fast kernels the packed encoder is the reference: plain PyTorch, whose attention goes sequence by sequence. On a
GPU that waits for the device and is slower than transformers. On a CPU its time was measured against transformers' (CPU
time of one thread, width 256, no padding; inference and training):

- fp32, rows of 8 or 16 tokens: 1.16 to 1.24; 128 slots in rows of 32 or 128: 1.04 to 1.08; 512 slots: 0.87 to 0.97,
  and less with padding, which is not computed (0.5 to 0.7 with a third of it);
- bf16 up to 2.8 and fp16 up to 1.2, by the clock;
- with the kernels, but heads of 48 columns, which attention's do not take: bf16 1.5 to 2.5 in inference and 1.0 to 1.9
  in training, so that such a model is treated as one without kernels.

In float64 transformers' code runs too: results are then those of transformers, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bertfast.encoder import copy_dtype
from bertfast.ops.attention import HEAD_DIMENSIONS
from bertfast.ops.dispatch import why_not

# fp32 on a CPU without kernels: batches with fewer slots (rows x columns) or columns are left to transformers.
MIN_SLOTS = 512
MIN_COLUMNS = 32


@dataclass(frozen=True)
class _Activations:
    """All that `why_not` asks of a tensor. A tensor itself would be an operation in the graph of torch.compile."""

    device: torch.device
    dtype: torch.dtype

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


def why_left_to_transformers(
    device: torch.device, dtype: torch.dtype, head_dimension: int | None = None, shape: tuple[int, int] | None = None
) -> str | None:
    """Return why a call runs transformers' own code for want of fast kernels; None: it runs packed.

    Args:
        device: Of the model's parameters.
        dtype: Of its GEMMs.
        head_dimension: Of its attention; None: there is no attention in the call.
        shape: Rows and columns of the padded batch; None: not known yet, or packed already.
    """
    if device.type in ("cpu", "cuda"):
        reason = why_not("cpu" if device.type == "cpu" else "triton", "attention", _Activations(device, dtype))
        if reason is None and head_dimension not in (None, *HEAD_DIMENSIONS):
            sizes = ", ".join(map(str, HEAD_DIMENSIONS))
            reason = f"its heads have {head_dimension} columns, the kernels take {sizes}"
        is_large = shape is None or (math.prod(shape) >= MIN_SLOTS and shape[1] >= MIN_COLUMNS)
        if device.type == "cpu" and dtype == torch.float32 and is_large:
            reason = None
    else:
        reason = "the kernels are for NVIDIA GPUs of sm_80 or later and for CPUs"
    return None if reason is None else f"no fast kernels for {str(dtype).removeprefix('torch.')} on {device}: {reason}"


def gemm_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer multiplies activations like `x`: autocast's where that applies."""
    return copy_dtype(x) or x.dtype
