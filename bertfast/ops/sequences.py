"""Boundaries of the sequences in a packed batch: `cu_seqlens` and what follows from it.

Packed tokens are concatenated in one dimension of `capacity` slots; sequence `s` occupies the slots
`cu_seqlens[s] … cu_seqlens[s + 1] - 1`. Slots from `cu_seqlens[-1]` on are padding slots: they belong to no sequence.

The host knows only sizes and bounds; lengths stay on the device. So the host does not wait for a GPU, a CUDA graph
captured for one batch serves others of its shape, and `torch.compile` can trace the packed path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from operator import index
from typing import Generic, SupportsIndex, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast.kernels.attention_tiles import tile_table
from bertfast.runtime.torch_compat import assert_on_device, is_readable

Value = TypeVar("Value")


class _CachedProperty(Generic[Value]):
    """Compute a property once: `functools.cached_property` takes a lock, which `torch.compile` cannot trace."""

    def __init__(self, compute: Callable[[Sequences], Value]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    @overload
    def __get__(self, sequences: None, owner: type) -> _CachedProperty[Value]: ...

    @overload
    def __get__(self, sequences: Sequences, owner: type) -> Value: ...

    def __get__(self, sequences: Sequences | None, owner: type) -> Value | _CachedProperty[Value]:
        if sequences is None:
            return self
        value = self.compute(sequences)
        if torch.compiler.is_compiling():
            return value
        # An entry in the instance's dictionary takes precedence over this descriptor.
        cached: Value = sequences.__dict__.setdefault(self.compute.__name__, value)
        return cached


@dataclass(frozen=True, eq=False)
class Sequences:
    """The division of `capacity` packed slots into sequences. Build it with a `from_…` method, which checks it once.

    Attributes:
        cu_seqlens: int32 [S + 1] on the activations' device; starts at 0 and never decreases.
        sequence_ids: int64 [S] on the same device; each sequence's id in the run, an RNG coordinate of dropout.
        capacity: T, slots of a packed activation, padding slots included.
        max_seqlen_bound: No sequence in any batch of the run is longer. It selects the kernels, so that all batches run
            the same ones, and a CUDA graph captured for one batch serves all.
    """

    cu_seqlens: Tensor
    sequence_ids: Tensor
    capacity: int
    max_seqlen_bound: int

    @classmethod
    def from_lengths(
        cls,
        lengths: Iterable[int] | Tensor,
        *,
        sequence_ids: Tensor | Iterable[int] | None = None,
        capacity: int | None = None,
        max_seqlen_bound: int | None = None,
        device: torch.device | str | None = None,
    ) -> Sequences:
        """Divide slots into sequences of the given lengths.

        Args:
            lengths: Python integers or an integer tensor [S]; 0 is allowed.
            sequence_ids: See `from_cu_seqlens`.
            capacity: See `from_cu_seqlens`.
            max_seqlen_bound: See `from_cu_seqlens`.
            device: Device of the result; None: that of a tensor, else the CPU.

        Raises:
            TypeError: A length is not an integer.
            ValueError: See `from_cu_seqlens`.
        """
        if not isinstance(lengths, Tensor):
            lengths = torch.tensor([_integer(length) for length in lengths], dtype=torch.int64)
        if lengths.dim() != 1 or not _is_integer(lengths):
            raise ValueError(
                f"lengths must be integers of shape [sequences], got {lengths.dtype} of shape {tuple(lengths.shape)}"
            )
        require((lengths >= 0).all(), "sequence lengths must not be negative", lengths.min)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
        sequences = cls.from_cu_seqlens(
            cu_seqlens, sequence_ids=sequence_ids, capacity=capacity, max_seqlen_bound=max_seqlen_bound
        )
        return sequences if device is None else sequences.to(device)

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens: Tensor,
        *,
        sequence_ids: Tensor | Iterable[int] | None = None,
        capacity: int | None = None,
        max_seqlen_bound: int | None = None,
    ) -> Sequences:
        """Divide slots into sequences by `cu_seqlens`, the usual argument of variable-length attention.

        Values on a GPU are not copied to the host: if they are invalid, a device-side assertion fails.

        Args:
            cu_seqlens: int64 or int32 [S + 1].
            sequence_ids: Integers [S]; default: 0, 1, …
            capacity: Number of slots; those after the last sequence are padding slots. Default: no padding slots, which
                requires `cu_seqlens` on the CPU.
            max_seqlen_bound: See the class. Default: the maximum length on the CPU, else `capacity`, which configures
                the kernels for one sequence of that length.

        Raises:
            TypeError: `cu_seqlens` is not a tensor.
            ValueError: Shapes, dtypes or, on the CPU, values are invalid; or `capacity` is missing for a tensor on a
                GPU.
        """
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"cu_seqlens must be an integer tensor, got {type(cu_seqlens).__name__}")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or cu_seqlens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"cu_seqlens must be an int64 or int32 tensor of shape [sequences + 1], "
                f"got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
            )
        on_host = is_readable(cu_seqlens)
        if capacity is None and not on_host:
            raise ValueError(f"cu_seqlens is on {cu_seqlens.device}: give capacity, the number of packed slots")
        require(cu_seqlens[0] == 0, "cu_seqlens must start at 0", lambda: cu_seqlens[0])
        lengths = cu_seqlens.diff()
        require((lengths >= 0).all(), "cu_seqlens must never decrease: a length is negative", lengths.min)
        capacity = int(cu_seqlens[-1]) if capacity is None else capacity
        if capacity >= 2**31:
            raise ValueError(f"a packed batch holds fewer than 2**31 tokens, got {capacity}")
        rule = f"the sequences hold more tokens than the {capacity} slots they are packed into"
        require(cu_seqlens[-1] <= capacity, rule, lambda: cu_seqlens[-1])
        if max_seqlen_bound is None:
            max_seqlen_bound = max(lengths.tolist(), default=0) if on_host else capacity
        rule = f"no sequence may be longer than max_seqlen_bound, {max_seqlen_bound} tokens"
        require((lengths <= max_seqlen_bound).all(), rule, lengths.max)
        count, device = len(cu_seqlens) - 1, cu_seqlens.device
        ids = torch.arange(count, device=device) if sequence_ids is None else torch.as_tensor(sequence_ids)
        if ids.shape != (count,):
            raise ValueError(f"{count} sequences need as many sequence ids, got shape {tuple(ids.shape)}")
        if count and not _is_integer(ids):  # an empty list becomes an empty float tensor
            raise ValueError(f"sequence ids must be integers, got {ids.dtype}")
        return cls(cu_seqlens.to(torch.int32), ids.to(device, torch.int64), capacity, max_seqlen_bound)

    def __len__(self) -> int:
        """Return the number of sequences, empty ones included."""
        return len(self.sequence_ids)

    @_CachedProperty
    def tile_table(self) -> Tensor:
        """int32 [N + 1, 4]: the tiles of the attention kernels; see `bertfast.kernels.attention_tiles.tile_table`."""
        return tile_table(self.cu_seqlens, self.capacity, self.max_seqlen_bound)

    @_CachedProperty
    def sequence_table(self) -> Tensor:
        """int32 [S + 1, 4]: a table like `tile_table` with one tile per sequence, which CUDA C++ attention takes."""
        bound = max(self.max_seqlen_bound, 1)
        return tile_table(self.cu_seqlens, self.capacity, bound, tile_rows=bound)

    @property
    def on_host(self) -> bool:
        """Whether `lengths` can be read without waiting for a device."""
        return is_readable(self.cu_seqlens)

    @_CachedProperty
    def lengths(self) -> tuple[int, ...]:
        """The S lengths, on the host. On a GPU this copies `cu_seqlens` and waits for the device."""
        return tuple(self.cu_seqlens.diff().tolist())

    @property
    def max_seqlen(self) -> int:
        """The maximum length, 0 without sequences; see `lengths`."""
        return max(self.lengths, default=0)

    @property
    def num_tokens(self) -> int:
        """The number of slots that belong to a sequence; see `lengths`."""
        return sum(self.lengths)

    @_CachedProperty
    def is_token(self) -> Tensor:
        """bool [T]: whether a slot belongs to a sequence."""
        return self._slots < self.cu_seqlens[-1]

    @_CachedProperty
    def sequence_index(self) -> Tensor:
        """int64 [T]: index of each slot's sequence; that of the last sequence at padding slots."""
        return torch.searchsorted(self.cu_seqlens[1:], self._slots, right=True).clamp(max=max(len(self) - 1, 0))

    @_CachedProperty
    def position(self) -> Tensor:
        """int64 [T]: each slot's position in its sequence; 0 at padding slots."""
        return torch.where(self.is_token, self._slots - self.cu_seqlens[self.sequence_index], 0).long()

    @_CachedProperty
    def first(self) -> Tensor:
        """int64 [S]: the slot of each sequence's first token; an arbitrary slot for an empty sequence.

        Empty sequences get different slots: if one row were gathered many times, its gradient would be serialised.
        """
        start = self.cu_seqlens[:-1].long()
        other = torch.arange(len(self), device=start.device) % max(self.capacity, 1)
        return torch.where(self.cu_seqlens.diff() > 0, start, other)

    @_CachedProperty
    def last(self) -> Tensor:
        """int64 [S]: the slot of each sequence's last token; an arbitrary slot for an empty sequence."""
        return (self.cu_seqlens[1:] - 1).long().clamp(min=0)

    @_CachedProperty
    def token_sequence_ids(self) -> Tensor:
        """int64 [T]: the id of each slot's sequence; that of the last sequence at padding slots."""
        return self.sequence_ids[self.sequence_index] if len(self) else torch.zeros_like(self.position)

    @property
    def _slots(self) -> Tensor:
        return torch.arange(self.capacity, dtype=torch.int32, device=self.cu_seqlens.device)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Sequences:
        """Return the sequences with their tensors on `device`."""
        return replace(
            self,
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
            sequence_ids=self.sequence_ids.to(device, non_blocking=non_blocking),
        )


def _is_integer(x: Tensor) -> bool:
    return not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool


def _integer(length: SupportsIndex) -> int:
    try:
        return index(length)
    except TypeError:
        raise TypeError(f"lengths must be integers, got {length!r}") from None


def require(condition: Tensor, rule: str, value: Callable[[], Tensor]) -> None:
    """Check that a bool tensor [] is true, without waiting for a device.

    Args:
        condition: The tensor.
        rule: Start of the error message, which ends with the actual value.
        value: Returns the actual value, an integer tensor []; called only for an error.

    Raises:
        ValueError: The condition is false, on the CPU. On a GPU a device-side assertion fails later.
    """
    if is_readable(condition):
        if not condition:
            raise ValueError(f"{rule}, got {int(value())}")
    elif condition.device.type != "meta" and not torch.compiler.is_compiling():
        assert_on_device(condition, rule)


def bucket(count: int) -> int:
    """Round a number of tokens up to one of few sizes, at most 12.5 % larger, since a CUDA graph is captured per size.

    The sizes are multiples of 8 and, from 64 on, 8 … 15 times a power of two; below, up to 7 tokens are added.
    """
    step = max(1 << max((count - 1).bit_length() - 4, 0), 8)
    return -(-count // step) * step
