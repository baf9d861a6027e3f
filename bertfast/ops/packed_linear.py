"""Linear layers for inference on a CPU, whose weights are packed once: in fp32, bf16 or int8.

The kernels read a packed weight from its first to its last byte: with few tokens they take the time of that. In int8 a
weight has one scale per row of W, and each token gets its own scale and zero point when it is multiplied: dynamic
quantisation, with the scale migration of SmoothQuant (Xiao et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast.ops import reference
from bertfast.ops.arguments import check_floating_dtype
from bertfast.ops.dispatch import Implementation, operator, resolve
from bertfast.runtime.torch_compat import cpu_has_amx, cpu_has_bf16_gemm

PackedActivation = Literal["none", "gelu", "gelu_tanh"]
"""What a packed linear layer computes of its sums."""

PANEL = 32  # rows of W that are packed together, as in csrc/packed_linear.h
MAX_TOKENS_WITHOUT_AMX = 32  # beyond, the arithmetic takes longer than reading the weight, and AMX is faster at it
_LARGEST = 127  # of the quantised values


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight W [N, K] and its bias, as the kernels read them. Build it with `pack` or `quantise`.

    Attributes:
        operands: fp32, bf16 or int8 [N / 32, K / E, 32, E]: 32 rows of W side by side, of each E = 1, 2 or 4 adjacent
            values; rows and columns beyond W's are zero.
        bias: [N], or empty.
        columns, depth: N and K.
        scales: fp32 [N] with int8: W[n] ≈ scales[n] · q[n] · factors.
        sums: int32 [N] with int8: those of the rows of q.
        factors: fp32 [K], by which the columns of x are multiplied before they are quantised; empty: by 1.
        dense: bf16 W [N, K] for oneDNN, where a CPU has AMX; else empty.
    """

    operands: Tensor
    bias: Tensor
    columns: int
    depth: int
    scales: Tensor
    sums: Tensor
    factors: Tensor
    dense: Tensor

    def uses_onednn(self, tokens: int) -> bool:
        """Return whether so many tokens are multiplied by oneDNN, whose GEMMs use AMX."""
        return len(self.dense) > 0 and tokens > MAX_TOKENS_WITHOUT_AMX

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors in the order in which the kernels take them."""
        return [self.operands, self.scales, self.sums, self.factors, self.bias]

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which the attention between packed layers is computed: in int8 bf16 where that is faster."""
        in_bf16 = self.operands.dtype == torch.bfloat16 or (self.operands.dtype == torch.int8 and cpu_has_bf16_gemm())
        return torch.bfloat16 if in_bf16 else torch.float32

    def unpacked(self) -> Tensor:
        """Return W [N, K], in fp32 or bf16; of int8 q [N, K]."""
        rows = self.operands.transpose(1, 2).flatten(0, 1).flatten(1)
        return rows[: self.columns, : self.depth].contiguous()

    def dequantised(self) -> Tensor:
        """Return W [N, K], in fp32 or bf16; of int8 with its rounding errors."""
        values = self.unpacked()
        return values if values.dtype != torch.int8 else dequantise(values, self.scales, self.factors)

    def rows(self, first: int, end: int) -> PackedWeight:
        """Return rows of W, multiples of 32, without copying them."""
        part = slice(first, end)
        panels = self.operands[first // PANEL : end // PANEL]
        names = ("scales", "sums", "bias", "dense")
        parts = {name: x[part] if len(x := getattr(self, name)) else x for name in names}
        return replace(self, operands=panels, columns=end - first, **parts)


def pack(weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> PackedWeight:
    """Pack a weight.

    Args:
        weight: [N, K], floating point.
        bias: [N]; None: no bias.
        dtype: fp32 or bf16; None: bf16 for half precision, else fp32.
    """
    if dtype is None:
        dtype = torch.bfloat16 if weight.dtype.itemsize == 2 else torch.float32
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"pack: dtype must be float32 or bfloat16, got {dtype}: int8 is made by quantise")
    weight = weight.detach().to(dtype)
    packed = _packed(weight, bias)
    return replace(packed, dense=weight) if dtype == torch.bfloat16 and cpu_has_amx() else packed


def quantise(weight: Tensor, bias: Tensor | None = None, factors: Tensor | None = None) -> PackedWeight:
    """Quantise a weight to int8 and pack it.

    Args:
        weight: [N, K], floating point and finite.
        bias: [N]; None: no bias.
        factors: fp32 [K], positive: multiplies the columns of x, and divides those of W; None: 1.

    Raises:
        ValueError: The weight is not finite.
    """
    weight = weight.detach().float()
    if not bool(weight.isfinite().all()):
        raise ValueError("quantise: the weight has values that are not finite")
    if factors is not None:
        weight = weight / factors
    scales = weight.abs().amax(dim=1) / _LARGEST if weight.shape[1] else weight.new_zeros(len(weight))
    scaled = weight / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    del weight  # else the temporary tensors of a layer count in the peak of memory
    values = scaled.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
    del scaled
    return packed_int8(values, scales, bias, factors)


def dequantise(values: Tensor, scales: Tensor, factors: Tensor | None) -> Tensor:
    """Return the weight [N, K] of quantised values, int8 [N, K]; see `PackedWeight`. No factors, or empty: 1."""
    weight = values * scales[:, None]
    return weight if factors is None or not len(factors) else weight * factors


def packed_int8(values: Tensor, scales: Tensor, bias: Tensor | None, factors: Tensor | None) -> PackedWeight:
    """Pack quantised values, int8 [N, K], with their scales; see `PackedWeight`."""
    sums = values.sum(dim=1, dtype=torch.int32)
    factors = values.new_empty(0, dtype=torch.float32) if factors is None else factors.float().contiguous()
    return replace(_packed(values, bias), scales=scales.float().contiguous(), sums=sums, factors=factors)


def _packed(weight: Tensor, bias: Tensor | None) -> PackedWeight:
    columns, depth = weight.shape
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"a packed weight {list(weight.shape)} takes a bias [{columns}], got {list(bias.shape)}")
    values = 4 // weight.dtype.itemsize  # per operand
    padded = F.pad(weight, (0, -depth % values, 0, -columns % PANEL))
    operands = torch.unflatten(torch.unflatten(padded, 1, (-1, values)), 0, (-1, PANEL)).transpose(1, 2).contiguous()
    absent = weight.new_empty(0, dtype=torch.float32)
    bias = absent if bias is None else bias.detach().contiguous()
    return PackedWeight(operands, bias, columns, depth, absent, absent.int(), absent, absent)


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    activation: PackedActivation = "none",
    *,
    dtype: torch.dtype | None = None,
    implementation: Implementation | None = None,
) -> Tensor:
    """Return activation(x W^T + bias), without gradients.

    Args:
        x: [T, K], floating point; rounded to bf16 for a weight in bf16, and quantised for one in int8, in which a token
            with a value that is not finite gives NaN.
        weight: The packed weight.
        activation: "gelu" is the exact one, "gelu_tanh" its approximation.
        dtype: Dtype of the result; None: that of x.
        implementation: Default: the fastest one that supports the arguments.

    Returns:
        [T, N].

    Raises:
        TypeError: An argument has an unsupported dtype.
        ValueError: Shapes or devices do not match, x requires a gradient, or `implementation` does not support the
            arguments.
    """
    check_floating_dtype("packed_linear", "dtype", dtype)
    if x.dim() != 2 or x.shape[1] != weight.depth or not x.is_floating_point():
        raise ValueError(
            f"packed_linear: x must be floating point of shape [tokens, {weight.depth}], "
            f"got {x.dtype} of shape {list(x.shape)}"
        )
    if activation not in ("none", "gelu", "gelu_tanh"):
        raise ValueError(f"packed_linear: activation must be none, gelu or gelu_tanh, got {activation!r}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("packed_linear: x requires a gradient, which packed weights do not have: use torch.no_grad()")
    dtype = dtype or x.dtype
    is_known = dtype in (torch.float32, torch.bfloat16)
    unsupported = None if is_known else f"its kernels return float32 and bfloat16, not {dtype}"
    implementation = resolve("packed_linear", implementation, x, unsupported)
    if implementation == "cpu" and weight.uses_onednn(len(x)):
        bias = weight.bias.to(torch.bfloat16) if len(weight.bias) else None
        return reference.activated(F.linear(x.to(torch.bfloat16), weight.dense, bias), activation).to(dtype)
    if implementation == "reference":
        values = weight.unpacked()
        return reference.packed_linear(x, values, weight.scales, weight.factors, weight.bias, activation, dtype)
    y: Tensor = operator(implementation, "packed_linear_forward")(x, weight.tensors, weight.columns, activation, dtype)
    return y
