"""Checks of the tensors that an operation is given: one sentence names what does not fit.

On a few tokens an operation takes some microseconds, so that all that can be known of it beforehand is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from bertfast.ops.dropout import Dropout

_DTYPES = {
    "floating": ("floating point", {torch.float32, torch.bfloat16, torch.float16, torch.float64}),
    "integer": ("int64 or int32", {torch.int64, torch.int32}),
}
_DESCRIPTION = re.compile(r"(optional |each )?(floating|integer) \[(.*)\]")


class Arguments:
    """The tensors that an operation takes.

    >>> Arguments("bias_gelu", x="floating [tokens, columns]", bias="floating [columns]").check(x, bias)

    A description names the kind, "floating" or "integer", and the dimensions, which are numbers or words; a word means
    the same size wherever it stands. A tensor that is "optional" may be None. The last description may be of "each" of
    any number of tensors.
    """

    def __init__(self, operation: str, **descriptions: str):
        self._operation = operation
        self._known: dict[str | int, int] = {}  # sizes by dimension, of those that are numbers
        self._arguments = tuple(self._parse(*item) for item in descriptions.items())
        self._takes_any_number = [*descriptions.values()][-1].startswith("each ")
        self._of_dropout = (
            self._parse("dropout.seed", "integer []"),
            self._parse("dropout.sequence_ids", "integer [tokens]"),
            self._parse("dropout.positions", "integer [tokens]"),
        )

    def _parse(self, name: str, description: str) -> tuple:
        prefix, kind, listed = _DESCRIPTION.fullmatch(description).groups()
        dimensions = tuple(int(word) if word.isdecimal() else word for word in listed.split(", ") if word)
        self._known |= {dimension: dimension for dimension in dimensions if isinstance(dimension, int)}
        return name, prefix == "optional ", dimensions, _DTYPES[kind]

    def check(self, *tensors: Tensor | None, dropout: Dropout | None = None) -> None:
        """Raise unless each tensor has the kind and shape of its description, and all live on one device.

        Args:
            tensors: In the order of the descriptions.
            dropout: Must know as many tokens as the dimension "tokens" says.

        Raises:
            TypeError: Something is no tensor, or one of another kind.
            ValueError: A shape or a device differs.
        """
        arguments = self._arguments
        if self._takes_any_number:
            *arguments, (name, *rest) = arguments
            given = range(len(tensors) - len(arguments))
            arguments = [*arguments, *[(f"{name}[{index}]", *rest) for index in given]]
        sizes = self._known.copy()
        device = self._check(arguments, tensors, sizes, None)
        if dropout is not None:
            coordinates = (dropout.seed, dropout.sequence_ids, dropout.positions)
            self._check(self._of_dropout, coordinates, sizes, device)

    def _check(
        self, arguments: Sequence[tuple], tensors: tuple[Tensor | None, ...], sizes: dict, device: torch.device | None
    ) -> torch.device | None:
        """Check `tensors` by what is known from others, add to `sizes`, and return the device of all."""
        for (name, optional, dimensions, (kind, dtypes)), tensor in zip(arguments, tensors, strict=True):
            if not isinstance(tensor, Tensor):
                if tensor is None and optional:
                    continue
                raise TypeError(f"{self._operation}: {name} must be a tensor, got {type(tensor).__name__}")
            shape = tensor.shape
            fits = len(shape) == len(dimensions)
            if fits:
                for dimension, size in zip(dimensions, shape, strict=True):
                    if sizes.setdefault(dimension, size) != size:
                        fits = False
            if not fits:
                expected = ", ".join(str(sizes.get(dimension, dimension)) for dimension in dimensions)
                raise ValueError(f"{self._operation}: {name} must have shape [{expected}], got {list(shape)}")
            if tensor.dtype not in dtypes:
                raise TypeError(f"{self._operation}: {name} must be {kind}, got {tensor.dtype}")
            if device is None:
                device = tensor.device
            elif tensor.device != device:
                raise ValueError(f"{self._operation}: {name} is on {tensor.device}, the other tensors are on {device}")
        return device
