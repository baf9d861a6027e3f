"""What every operation shares: the names of the implementations, and the checks of what it is given."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from bertfast.dropout import Dropout

Implementation = Literal["reference", "cpu", "triton", "cuda"]
"""Plain PyTorch, the compiled library, Triton, or CUDA C++ for Hopper."""


def choose(operation: str, requested: Implementation | None, offered: tuple[Implementation, ...]) -> Implementation:
    """The implementation to run: the one requested, else the first of those `offered` for the tensors at hand."""
    if requested is None:
        return offered[0]
    if requested not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"{operation}: implementation must be one of {known}, got {requested!r}")
    if requested not in offered:
        raise ValueError(
            f"{operation}: no {requested!r} implementation for these tensors; there is {', '.join(offered)}"
        )
    return requested


def check(operation: str, dropout: Dropout | None = None, **tensors: tuple[Tensor | None, str, str]) -> None:
    """Check each named tensor's (value, dimensions, kind), and that all live on one device.

    Dimensions are words, or numbers, with a space between; a word means the same size wherever it stands. Kind is
    "floating" or "integer". A tensor that is None is passed over. `dropout` must know as many tokens as "tokens" says.
    """
    if dropout is not None:
        tensors |= {
            "dropout.seed": (dropout.seed, "", "integer"),
            "dropout.sequence_number": (dropout.sequence_number, "tokens", "integer"),
            "dropout.position": (dropout.position, "tokens", "integer"),
        }
    sizes: dict[str, int] = {}
    device = None
    for name, (tensor, dimensions, kind) in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operation}: {name} must be a tensor, got {type(tensor).__name__}")
        wanted = [int(word) if word.isdecimal() else sizes.get(word, word) for word in dimensions.split()]
        if len(wanted) != tensor.dim() or any(
            isinstance(want, int) and want != have for want, have in zip(wanted, tensor.shape, strict=True)
        ):
            wanted = ", ".join(map(str, wanted))
            raise ValueError(f"{operation}: {name} must have shape [{wanted}], got {list(tensor.shape)}")
        sizes.update(zip(dimensions.split(), tensor.shape, strict=True))
        if kind == "floating" and not tensor.is_floating_point():
            raise TypeError(f"{operation}: {name} must be floating point, got {tensor.dtype}")
        if kind == "integer" and tensor.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{operation}: {name} must be int64 or int32, got {tensor.dtype}")
        device = device or tensor.device
        if tensor.device != device:
            raise ValueError(f"{operation}: {name} is on {tensor.device}, the other tensors are on {device}")
