"""fp32 GEMMs on a CPU, by the faster one of PyTorch's two libraries.

By default PyTorch calls MKL, which uses only 256-bit vectors on CPUs that are not Intel's. oneDNN, which is part of
PyTorch too, uses all 512 bits. A table of CPUs and shapes says which is called.
"""

from __future__ import annotations

import re
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast.kernels import logits_in_chunks
from bertfast.ops.dispatch import run
from bertfast.runtime.torch_compat import autocast_dtype, has_onednn, is_transformed, onednn_add_linear, onednn_linear

# oneDNN rounds after each term of a sum, MKL less often: its error is 2.2 times MKL's for 3,072 terms, 1.5 for 768.
_MAX_DEPTH = 768
_MIN_SIZE = 16  # rows or columns: below, oneDNN's overhead exceeds its gain
_ANY = range(sys.maxsize)
# Families and models of AMD's CPUs with AVX-512, and `onednn_depth`. On Zen 4 oneDNN was measured to be 4 to 25 %
# faster, of which sums in pieces of _MAX_DEPTH would cost 4 to 8; on Zen 5 it is about twice as fast
# (`bench.gemm_libraries`).
_AMD = (
    (range(25, 26), {*range(0x10, 0x20), *range(0x60, 0x80), *range(0xA0, 0xB0)}, _MAX_DEPTH),
    (range(26, 256), _ANY, sys.maxsize),
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias as `F.linear` does, with autocast and gradients.

    Args:
        x: [N, K].
        weight: [M, K].
        bias: [M].

    Returns:
        [N, M].
    """
    if torch.compiler.is_compiling() or autocast_dtype(x.device) is not None or not uses_onednn(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = run(_Linear, x, weight, bias)
    return y


def matmul_nt(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Write a b^T to `out`, or add it: a [N, K], b [M, K], out [N, M], all of one dtype."""
    if not uses_onednn(a, b):
        logits_in_chunks.matmul_nt(a, b, out, add=add)
    elif add:
        out += onednn_gemm(a, b)
    else:
        out.copy_(onednn_gemm(a, b))


def uses_onednn(a: Tensor, b: Tensor) -> bool:
    """Return whether a b^T is computed by oneDNN: a [N, K], b [M, K]."""
    fp32 = a.dtype == b.dtype == torch.float32 and a.device.type == "cpu" and a.dim() == 2
    return fp32 and min(*a.shape, len(b)) >= _MIN_SIZE and a.shape[1] <= onednn_depth() and not is_transformed()


def caches_shapes(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a linear layer of this dtype is computed by oneDNN, which keeps code for each number of rows.

    oneDNN keeps the last 1,024 combinations of sizes, of about 1 MiB each: batches of ever new numbers of tokens fill a
    GiB of memory, and each waits for its code to be generated. Batches are therefore padded to a few sizes.
    """
    return device.type == "cpu" and (dtype in (torch.bfloat16, torch.float16) or onednn_depth() > 0)


@cache
def onednn_depth() -> int:
    """Return the most terms of a sum for which oneDNN's fp32 GEMMs are faster than MKL's on this CPU; 0: none.

    The CPU's name decides and not a measurement, so that all runs on a machine compute bitwise identical GEMMs.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if not has_onednn() or not cpuinfo.is_file() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return 0
    return _measured_depth(cpuinfo.read_text())


def _measured_depth(cpuinfo: str) -> int:
    """Look up `onednn_depth` of a CPU with AVX-512, described as in /proc/cpuinfo."""
    fields = dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (.+)$", cpuinfo, re.MULTILINE))
    if fields.get("vendor_id") != "AuthenticAMD":
        return 0
    family, model = int(fields["cpu family"]), int(fields["model"])
    return next((depth for families, models, depth in _AMD if family in families and model in models), 0)


class _Linear(torch.autograd.Function):
    """A linear layer whose gradients are computed by `onednn_gemm` too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_gemm(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad
        gemm = partial(run, _Linear)  # differentiable if gradients are enabled
        d_x = gemm(d_y, weight.mT, None) if needs_grad[0] else None
        d_weight = None
        if needs_grad[1]:
            # PyTorch copies the first factor to rows, so the one with fewer elements is the first.
            narrow = x.shape[1] < d_y.shape[1]
            d_weight = gemm(x.mT, d_y.mT, None).mT if narrow else gemm(d_y.mT, x.mT, None)
        return d_x, d_weight, d_y.sum(0) if needs_grad[2] else None


def onednn_gemm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a b^T + bias, split into sums of equal length, at most _MAX_DEPTH: a [N, K], b [M, K], bias [M]."""
    parts = -(-a.shape[1] // _MAX_DEPTH)
    step = -(-a.shape[1] // parts)
    total = onednn_linear(_in_rows_or_columns(a[:, :step]), _dense(b[:, :step]), bias)
    for start in range(step, a.shape[1], step):
        part = slice(start, start + step)
        total = onednn_add_linear(total, _in_rows_or_columns(a[:, part]), _dense(b[:, part]))
    return total


# With other layouts oneDNN takes a thousand times as long.
def _dense(x: Tensor) -> Tensor:
    """Return x if its elements, or those of its transpose, are contiguous, else a copy."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def _in_rows_or_columns(x: Tensor) -> Tensor:
    """Return x if its rows, or its columns, are contiguous and do not overlap, else a copy."""
    (rows, columns), (row_stride, column_stride) = x.shape, x.stride()
    in_rows = column_stride == 1 and row_stride >= columns
    return x if in_rows or (row_stride == 1 and column_stride >= rows) else x.contiguous()
