"""Checks of indices on a CPU, where reading them takes one pass and does not wait for a device."""

from __future__ import annotations

from torch import Tensor

from bertfast.runtime.torch_compat import is_traced


def check_below(
    operation: str, name: str, indices: Tensor, size: int, table: str, *, negative_is_ignored: bool = False
) -> None:
    """Raise IndexError if one of `indices` is not a row of `table`.

    Do nothing on a GPU, and while operations are traced or recorded, when values must not be read.

    Args:
        operation: Name of the operator, for the message.
        name: Name of the argument that holds the indices.
        indices: int [N].
        size: Number of rows of the table.
        table: Name of the argument that is indexed.
        negative_is_ignored: Whether negative indices are allowed, as labels of ignored rows.
    """
    if indices.device.type != "cpu" or is_traced() or indices.numel() == 0:
        return
    low, high = (int(x) for x in indices.aminmax())
    if high < size and (low >= 0 or negative_is_ignored):
        return
    outside = (indices >= size) if negative_is_ignored else (indices >= size) | (indices < 0)
    position = int(outside.nonzero()[0])
    allowed = f"0 … {size - 1}" + (", or negative (-100) for an ignored row" if negative_is_ignored else "")
    raise IndexError(
        f"{operation}: {name}[{position}] is {int(indices[position])}, but {table} has {size} rows: "
        f"{name} must be in {allowed}"
    )
