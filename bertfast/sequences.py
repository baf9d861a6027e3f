"""Boundaries of the sequences in a packed batch: `cu_seqlens` and what follows from it.

Packed tokens lie end to end in one dimension of `capacity` slots; sequence `s` occupies the slots
`cu_seqlens[s] … cu_seqlens[s + 1] - 1`. Slots from `cu_seqlens[-1]` on are padding slots: they belong to no sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sequences:
    """The division of `capacity` packed slots into sequences. Build it with a `from_…` method, which checks it once.

    Attributes:
        cu_seqlens: int32 [S + 1] on the activations' device; starts at 0, never decreases.
        sequence_ids: int64 [S] on the same device; each sequence's id in the run, an RNG coordinate of dropout.
        lengths: the S lengths, on the host.
        capacity: slots of a packed activation, padding slots included.
        max_seqlen_bound: no sequence is longer, nor is any in another batch of the run. Kernels are chosen by it, so
            that all batches run the same ones, and a CUDA graph captured for one batch serves them all.
    """

    cu_seqlens: Tensor
    sequence_ids: Tensor
    lengths: tuple[int, ...]
    capacity: int
    max_seqlen_bound: int

    @classmethod
    def from_lengths(
        cls,
        lengths,
        *,
        sequence_ids=None,
        capacity: int | None = None,
        max_seqlen_bound: int | None = None,
        device=None,
    ) -> Sequences:
        """Sequences of the given lengths (host integers, 0 allowed), with ids 0, 1, … or `sequence_ids` [S].

        `capacity` (default: the sum of the lengths) leaves padding slots at the end; `max_seqlen_bound` defaults to
        the greatest length.
        """
        lengths = tuple(int(length) for length in lengths)
        if any(length < 0 for length in lengths):
            raise ValueError(f"sequence lengths must not be negative, got {min(lengths)}")
        total = sum(lengths)
        capacity = total if capacity is None else capacity
        if total > capacity:
            raise ValueError(f"the sequences hold {total} tokens, more than the {capacity} slots they are packed into")
        max_seqlen = max(lengths, default=0)
        max_seqlen_bound = max_seqlen if max_seqlen_bound is None else max_seqlen_bound
        if max_seqlen > max_seqlen_bound:
            raise ValueError(f"a sequence of {max_seqlen} tokens is longer than the limit of {max_seqlen_bound}")
        if capacity >= 2**31:
            raise ValueError(f"a packed batch holds fewer than 2**31 tokens, got {capacity}")
        sequence_ids = torch.arange(len(lengths)) if sequence_ids is None else torch.as_tensor(sequence_ids)
        if sequence_ids.shape != (len(lengths),):
            raise ValueError(
                f"{len(lengths)} sequences need as many sequence ids, got shape {tuple(sequence_ids.shape)}"
            )
        cu_seqlens = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        return cls(cu_seqlens.to(device), sequence_ids.to(device, torch.int64), lengths, capacity, max_seqlen_bound)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, *, sequence_ids=None, capacity: int | None = None) -> Sequences:
        """Sequences from `cu_seqlens` [S + 1], an integer tensor as variable-length attention takes it elsewhere.

        Copies it to the host, which waits for the device: build once per batch.
        """
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"cu_seqlens must be an integer tensor of shape [sequences + 1], "
                f"got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
            )
        starts = cu_seqlens.tolist()
        if starts[0] != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {starts[0]}")
        lengths = [end - start for start, end in pairwise(starts)]
        if any(length < 0 for length in lengths):
            raise ValueError("cu_seqlens must never decrease")
        return cls.from_lengths(lengths, sequence_ids=sequence_ids, capacity=capacity, device=cu_seqlens.device)

    @cached_property
    def max_seqlen(self) -> int:
        """Length of the longest sequence, 0 if there is none."""
        return max(self.lengths, default=0)

    @cached_property
    def num_tokens(self) -> int:
        """Number of slots that belong to a sequence."""
        return sum(self.lengths)

    @cached_property
    def sequence_index(self) -> Tensor:
        """int64 [T]: index of the sequence that each slot belongs to; padding slots name the last one."""
        last = max(self.sequence_ids.numel() - 1, 0)
        return torch.searchsorted(self.cu_seqlens[1:], self._slots, right=True).clamp(max=last)

    @cached_property
    def position(self) -> Tensor:
        """int64 [T]: each slot's position in its sequence; 0 at padding slots."""
        slots = self._slots
        return torch.where(slots < self.cu_seqlens[-1], slots - self.cu_seqlens[self.sequence_index], 0).long()

    @cached_property
    def first(self) -> Tensor:
        """int64 [S]: the slot of each sequence's first token; an empty one names some other slot."""
        return self.cu_seqlens[:-1].long().clamp(max=self.capacity - 1)

    @cached_property
    def last(self) -> Tensor:
        """int64 [S]: the slot of each sequence's last token; an empty one names some other slot."""
        return (self.cu_seqlens[1:] - 1).long().clamp(min=0)

    @cached_property
    def token_sequence_ids(self) -> Tensor:
        """int64 [T]: id of the sequence that each slot belongs to."""
        if self.sequence_ids.numel() == 0:
            return torch.zeros_like(self.position)
        return self.sequence_ids[self.sequence_index]

    @property
    def _slots(self) -> Tensor:
        # What follows is computed on the device from cu_seqlens, so that a captured step holds for other lengths.
        return torch.arange(self.capacity, dtype=torch.int32, device=self.cu_seqlens.device)

    def without_lengths(self) -> Sequences:
        """Return the same sequences without host lengths, which must not be read while a step is captured."""
        return replace(self, lengths=_Unknown())

    def to(self, device, non_blocking: bool = False) -> Sequences:
        """Return the same sequences with their tensors on `device`."""
        return replace(
            self,
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
            sequence_ids=self.sequence_ids.to(device, non_blocking=non_blocking),
        )


class _Unknown(tuple):
    """Lengths that the host does not know."""

    def _asked(self, *arguments):
        raise RuntimeError("a step that is recorded for other batches asked for the lengths of this one")

    __iter__ = __len__ = __getitem__ = _asked
