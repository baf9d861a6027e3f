"""Rotary position embedding of queries and keys (Su et al., 2021), in the layout of GPT-NeoX and Hugging Face.

Element i of a head is rotated with element i + D / 2. Computed in fp32 at least.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bertfast.ops import reference
from bertfast.ops.arguments import Arguments
from bertfast.ops.dispatch import Implementation, operator, resolve, run
from bertfast.ops.double_backward import must_be_differentiable, reference_gradients

_ARGUMENTS = Arguments(
    "rotary", qkv="floating [tokens, 3, heads, head_dimension]", table="floating [tokens, head_dimension]"
)


def rotary(qkv: Tensor, table: Tensor, *, implementation: Implementation | None = None) -> Tensor:
    """Return qkv with queries and keys rotated by the angles of their positions.

    For each query and key x: y[i] = x[i] cos[i] - x[i + D/2] sin[i] and y[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i].

    Args:
        qkv: [T, 3, A, D], floating point, D even: queries, keys and values.
        table: fp32 [T, D]: row t holds the cosines of the D/2 angles of token t's position, then their sines. It gets
            no gradient.
        implementation: Default: the fastest one that supports the arguments.

    Returns:
        A new tensor [T, 3, A, D] in qkv's dtype; the values are copies.

    Raises:
        TypeError: An argument has an unsupported dtype.
        ValueError: Shapes or devices do not match, D is odd, `table` requires a gradient, or `implementation` does not
            support the arguments.
    """
    _ARGUMENTS.check(qkv, table)
    if table.shape[1] % 2:
        raise ValueError(f"rotary: the head dimension must be even, got {table.shape[1]}")
    if table.dtype != torch.float32:
        raise TypeError(f"rotary: table must be float32, got {table.dtype}: compute cosines and sines in float32")
    if table.requires_grad:
        raise ValueError("rotary: table requires a gradient, which rotary does not compute: pass table.detach()")
    implementation = resolve("rotary", implementation, qkv)
    if implementation == "reference":
        return reference.rotary(qkv, table)
    y: Tensor = run(Rotary, implementation, qkv, table)
    return y


class Rotary(torch.autograd.Function):
    """The kernels as a differentiable operation; the gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, implementation: Implementation, qkv: Tensor, table: Tensor) -> Tensor:
        ctx.implementation = implementation
        ctx.save_for_backward(table)
        y: Tensor = operator(implementation, "rotary_forward")(qkv, table)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        (table,) = ctx.saved_tensors
        if must_be_differentiable():
            # The operation is linear: its gradient is the same at any qkv, which is therefore not saved.
            arguments, needs_grad = (d_y.detach().requires_grad_(), table), (True, False)
            return None, *reference_gradients(reference.rotary, arguments, needs_grad, [d_y])
        return None, operator(ctx.implementation, "rotary_backward")(d_y, table), None
