"""Decide whether a call has fast kernels, or is left to transformers' own code.

Without fast kernels the packed encoder is the reference: plain PyTorch, whose attention runs sequence by sequence. On a
GPU that waits for the device and is slower than transformers. On a CPU its time was measured relative to transformers'
(CPU time of one thread, width 256, no padding; inference and training):

- fp32, rows of 8 or 16 tokens: 1.16 to 1.24; 128 slots in rows of 32 or 128: 1.04 to 1.08; 512 slots: 0.87 to 0.97,
  and less with padding, which is not computed (0.5 to 0.7 with a third of it);
- bf16 up to 2.8 and fp16 up to 1.2, in wall-clock time;
- with the kernels, but with head dimension 48, which the attention kernels do not support: bf16 1.5 to 2.5 in
  inference and 1.0 to 1.9 in training, so that such a model is treated as one without kernels.

Few tokens without padding are no faster packed, even with the kernels: most of a call's time goes to reading the
weights, and an operator costs as much as those of PyTorch that it replaces. Measured in inference on a Xeon with AMX,
relative to transformers: 1.03 to 1.16 at 8 to 64 tokens and 1.01 to 1.09 at 128 with 6 layers of width 384, and 0.99 to
1.06 with 12 layers of width 768.

In float64 transformers' own code runs too: results are then bitwise identical with those of transformers.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from bertfast.encoder.layer import copy_dtype
from bertfast.ops import dispatch
from bertfast.ops.attention import HEAD_DIMENSIONS
from bertfast.runtime import torch_compat

# In fp32 on a CPU without kernels, batches with fewer slots (rows x columns) or columns are left to transformers.
MIN_SLOTS = 512
MIN_COLUMNS = 32
GLOBAL_HOOKS = "hooks are registered for all modules of PyTorch"
# In inference on a CPU, batches without padding that have fewer slots are left to transformers.
MIN_SLOTS_WITHOUT_PADDING = 128


def unsupported_reason(
    device: torch.device, dtype: torch.dtype, head_dimension: int | None = None, shape: tuple[int, int] | None = None
) -> str | None:
    """Return why a call has no fast kernels and is left to transformers, or None if it can run packed.

    Args:
        device: Device of the model's parameters.
        dtype: Dtype of its GEMMs.
        head_dimension: Dimension of an attention head; None if the call has no attention.
        shape: Rows and columns of the padded batch; None if they do not matter, or the batch is packed already.
    """
    is_large = shape is None or (math.prod(shape) >= MIN_SLOTS and shape[1] >= MIN_COLUMNS)
    if device.type == "cpu" and dtype == torch.float32 and is_large:
        return None
    reason: str | None = "the kernels run on CPUs and on NVIDIA GPUs from sm_80 on"
    if device.type in ("cpu", "cuda"):
        # Has the attributes that are read of activations; a tensor would be an operation in the graph of torch.compile.
        activations = cast(Tensor, SimpleNamespace(device=device, dtype=dtype, is_cuda=device.type == "cuda"))
        reason = dispatch.unsupported_reason("cpu" if device.type == "cpu" else "triton", "attention", activations)
        if reason is None and head_dimension not in (None, *HEAD_DIMENSIONS):
            *sizes, last = map(str, HEAD_DIMENSIONS)
            reason = f"its head dimension is {head_dimension}; the kernels support {', '.join(sizes)} and {last}"
    return None if reason is None else f"no fast kernels for {str(dtype).removeprefix('torch.')} on {device}: {reason}"


def module_unsupported_reason(
    parameter: Tensor | None, head_dimension: int | None = None, shape: tuple[int, int] | None = None
) -> str | None:
    """Return `unsupported_reason` for the device and dtype of a module's parameter; None: the module has none."""
    if parameter is None:
        return "its parameters are flattened by FSDP1: pass use_orig_params=True"
    return unsupported_reason(parameter.device, gemm_dtype(parameter), head_dimension, shape)


def tracing_unsupported_reason(x: Tensor) -> str | None:
    """Return why a call with the input `x` runs under a transform, or hooks, that fused modules do not support."""
    if torch.compiler.is_compiling():
        return "torch.export makes graphs without operations of bertfast" if torch.compiler.is_exporting() else None
    if torch_compat.has_global_hooks():
        return GLOBAL_HOOKS
    if torch_compat.is_jit_tracing():
        return "torch.jit makes graphs without operations of bertfast"
    if not torch_compat.has_values(x):
        return "the tensors are fake or on meta"
    if torch_compat.is_transformed():
        return "torch.func transforms the call"
    return None


def gemm_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer multiplies activations like `x`: autocast's where that applies."""
    return copy_dtype(x) or x.dtype
