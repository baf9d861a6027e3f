"""Matrix products in fp32 on a CPU, by whichever of PyTorch's two libraries is the faster one there.

Left to itself PyTorch asks MKL, which keeps to 256-bit vectors on processors that are not Intel's. oneDNN, which comes
with PyTorch too, does not: on an EPYC of family 26 it multiplies 2.1 times as fast.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast.kernels import logits_in_chunks
from bertfast.runtime.torch_compat import autocast_dtype, is_transformed

# oneDNN rounds after each term of a sum, MKL less often: of 3,072 terms its error is 2.2 times MKL's, of 768 1.5 times.
_DEPTH = 768
_LEAST = 16  # rows or columns: a product of fewer is over sooner than oneDNN has begun


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: x [N, K], weight [M, K], bias [M] -> [N, M], as F.linear, autocast and gradients included."""
    if torch.compiler.is_compiling() or autocast_dtype(x.device) is not None or not goes_to_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _product(x, weight, bias)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Write a b^T to `out`, or add it: a [N, K], b [M, K], out [N, M], all of one dtype."""
    if not goes_to_onednn(a, b):
        logits_in_chunks.matmul_nt(a, b, out, add=add)
    elif add:
        out += _product(a, b)
    else:
        out.copy_(_product(a, b))


def goes_to_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether a product of these is oneDNN's."""
    fp32 = a.dtype == b.dtype == torch.float32 and a.device.type == "cpu" and a.dim() == 2
    return fp32 and min(*a.shape, len(b)) >= _LEAST and onednn_is_faster() and not is_transformed()


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies faster than MKL on this processor: AMD's with 512-bit vectors of full width, Zen 5 on.

    Told by its name and not by a clock, so that all runs on a machine multiply alike to the last bit.
    """
    known = Path("/proc/cpuinfo")
    if not torch.backends.mkldnn.is_available() or not known.is_file():
        return False
    fields = dict(re.findall(r"^(vendor_id|cpu family)\s*: (.+)$", known.read_text(), re.MULTILINE))
    zen_5 = fields.get("vendor_id") == "AuthenticAMD" and int(fields.get("cpu family", 0)) >= 26
    return zen_5 and torch.backends.cpu.get_cpu_capability() == "AVX512"


class _Linear(torch.autograd.Function):
    """A product and its gradients, which are products too."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, d_y):
        x, weight = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad
        matmul = _Linear.apply if torch.is_grad_enabled() else _product  # differentiable where gradients are recorded
        d_x = matmul(d_y, weight.mT, None) if needs_grad[0] else None
        d_weight = matmul(d_y.mT, x.mT, None) if needs_grad[1] else None
        return d_x, d_weight, d_y.sum(0) if needs_grad[2] else None


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias in pieces of at most _DEPTH terms, of equal length: a [N, K], b [M, K], bias [M] -> [N, M]."""
    onednn = torch.ops.mkldnn._linear_pointwise
    pieces = -(-a.shape[1] // _DEPTH)
    step = -(-a.shape[1] // pieces)
    total = onednn(_in_order(a[:, :step]), _dense(b[:, :step]), bias, "none", [], "")
    for start in range(step, a.shape[1], step):
        piece = slice(start, start + step)
        total = onednn.binary(_in_order(a[:, piece]), total, _dense(b[:, piece]), None, "add")
    return total


# Of other layouts oneDNN takes a thousand times as long.
def _dense(x: Tensor) -> Tensor:
    """x as it is if it fills its memory by rows or by columns, else a copy."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def _in_order(x: Tensor) -> Tensor:
    """x as it is if its rows, or its columns, are each in one piece and apart, else a copy."""
    (rows, columns), (down, right) = x.shape, x.stride()
    return x if (right == 1 and down >= columns) or (down == 1 and right >= rows) else x.contiguous()
