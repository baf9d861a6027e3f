"""Checks of the tensors that an operator is given. An error is one sentence that names what does not match.

Descriptions are parsed in advance: on a few tokens a whole operator takes some microseconds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bertfast.ops.dropout import Dropout

_DTYPES = {
    "floating": ("floating point", {torch.float32, torch.bfloat16, torch.float16, torch.float64}),
    "integer": ("int64 or int32", {torch.int64, torch.int32}),
}
_DESCRIPTION = re.compile(r"(optional |each )?(floating|integer) \[(.*)\]")
_Sizes = dict[str | int, int]  # by dimension: its name, or a number, which is its own size


def check_floating_dtype(operation: str, name: str, dtype: object) -> None:
    """Check an optional argument that is a floating-point dtype.

    Raises:
        TypeError: It is something else.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{operation}: {name} must be a floating-point torch.dtype, got {dtype!r}")


class _Argument(NamedTuple):
    """A parsed description of an argument."""

    name: str
    optional: bool
    dimensions: tuple[str | int, ...]
    kind: str
    dtypes: set[torch.dtype]


class Arguments:
    """The tensors that an operator takes.

    >>> Arguments("bias_gelu", x="floating [tokens, columns]", bias="floating [columns]").check(x, bias)

    A description has a kind, "floating" or "integer", and dimensions, which are numbers or names; a name means the same
    size in all descriptions. A tensor that is "optional" may be None. The last description may start with "each": it
    applies to any number of tensors.
    """

    def __init__(self, operation: str, **descriptions: str) -> None:
        self._operation = operation
        self._numbers: _Sizes = {}
        self._arguments = tuple(self._parse(*item) for item in descriptions.items())
        self._is_variadic = [*descriptions.values()][-1].startswith("each ")
        self._dropout_arguments = (
            self._parse("dropout.seed", "integer []"),
            self._parse("dropout.sequence_ids", "integer [tokens]"),
            self._parse("dropout.positions", "integer [tokens]"),
        )

    def _parse(self, name: str, description: str) -> _Argument:
        match = _DESCRIPTION.fullmatch(description)
        assert match is not None, description
        prefix, kind, listed = match.groups()
        dimensions = tuple(int(part) if part.isdecimal() else part for part in listed.split(", ") if part)
        self._numbers |= {dimension: dimension for dimension in dimensions if isinstance(dimension, int)}
        return _Argument(name, prefix == "optional ", dimensions, *_DTYPES[kind])

    def check(self, *tensors: Tensor | None, dropout: Dropout | None = None) -> None:
        """Check that each tensor matches its description, and that all are on one device.

        Args:
            tensors: The tensors, in the order of the descriptions.
            dropout: Its coordinates must have the size of the dimension "tokens".

        Raises:
            TypeError: An argument is not a tensor, or has a dtype of another kind.
            ValueError: A shape or a device does not match.
        """
        arguments: Sequence[_Argument] = self._arguments
        if self._is_variadic:
            *first, each = arguments
            arguments = [*first, *(each._replace(name=f"{each.name}[{i}]") for i in range(len(tensors) - len(first)))]
        sizes = self._numbers.copy()
        device = self._check(arguments, tensors, sizes, None)
        if dropout is not None:
            coordinates = (dropout.seed, dropout.sequence_ids, dropout.positions)
            self._check(self._dropout_arguments, coordinates, sizes, device)

    def _check(
        self,
        arguments: Sequence[_Argument],
        tensors: tuple[Tensor | None, ...],
        sizes: _Sizes,
        device: torch.device | None,
    ) -> torch.device | None:
        """Check `tensors` against known `sizes` and `device`, add to `sizes`, and return the device."""
        for (name, optional, dimensions, kind, dtypes), tensor in zip(arguments, tensors, strict=True):
            if not isinstance(tensor, Tensor):
                if tensor is None and optional:
                    continue
                raise TypeError(f"{self._operation}: {name} must be a tensor, got {type(tensor).__name__}")
            shape = tensor.shape
            matches = len(shape) == len(dimensions)
            if matches:
                for dimension, size in zip(dimensions, shape, strict=True):
                    if sizes.setdefault(dimension, size) != size:
                        matches = False
            if not matches:
                expected = ", ".join(str(sizes.get(dimension, dimension)) for dimension in dimensions)
                raise ValueError(f"{self._operation}: {name} must have shape [{expected}], got {list(shape)}")
            if tensor.dtype not in dtypes:
                raise TypeError(f"{self._operation}: {name} must be {kind}, got {tensor.dtype}")
            if device is None:
                device = tensor.device
            elif tensor.device != device:
                raise ValueError(f"{self._operation}: {name} is on {tensor.device}, the other tensors are on {device}")
        return device
