"""What every operation shares: the names of the implementations, and the checks of what it is given."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

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


def check(operation: str, like: Tensor, **tensors: tuple[Tensor | None, tuple[int | str, ...], str]) -> None:
    """Check each named tensor's (value, shape, kind), kind "floating" or "integer", and that all live beside `like`.

    A dimension given as a word is free; a tensor that is None is passed over.
    """
    for name, (tensor, shape, kind) in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operation}: {name} must be a tensor, got {type(tensor).__name__}")
        fits = len(tensor.shape) == len(shape) and all(
            isinstance(want, str) or have == want for have, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"{operation}: {name} must have shape [{wanted}], got {list(tensor.shape)}")
        if kind == "floating" and not tensor.is_floating_point():
            raise TypeError(f"{operation}: {name} must be floating point, got {tensor.dtype}")
        if kind == "integer" and tensor.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{operation}: {name} must be int64 or int32, got {tensor.dtype}")
        if tensor.device != like.device:
            raise ValueError(f"{operation}: {name} is on {tensor.device}, the other tensors are on {like.device}")


def check_dropout(operation: str, dropout, tokens: int, like: Tensor) -> None:
    """Check that `dropout`, if any, names the identity of `tokens` tokens."""
    if dropout is None:
        return
    check(
        operation,
        like,
        **{
            "dropout.seed": (dropout.seed, (), "integer"),
            "dropout.sequence_number": (dropout.sequence_number, (tokens,), "integer"),
            "dropout.position": (dropout.position, (tokens,), "integer"),
        },
    )
