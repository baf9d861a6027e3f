"""Where each sequence of a packed batch starts: `cu_seqlens` and what follows from it.

Packed tokens lie end to end in one dimension of `tokens` places; sequence `s` occupies places
`cu_seqlens[s] .. cu_seqlens[s + 1]`. Places beyond `cu_seqlens[-1]` are inert: no sequence owns them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from bertfast.kernels.attention_tiles import tile_table


@dataclass(frozen=True, eq=False)
class Sequences:
    """The division of `tokens` packed places into sequences. Build it with a `from_…` method, which checks it once.

    Attributes:
        cu_seqlens: int32 [S + 1] on the activations' device; starts at 0, never decreases.
        numbers: int64 [S] on the same device; each sequence's own number in the run, from which dropout draws.
        lengths: the S lengths, on the host.
        tokens: places in a packed activation, inert ones included.
        length_limit: no sequence is longer, nor would be in another batch of the run. Kernels are chosen by it, so
            that all batches run the same ones, and a step that a CUDA graph captured serves them all.
    """

    cu_seqlens: Tensor
    numbers: Tensor
    lengths: tuple[int, ...]
    tokens: int
    length_limit: int

    @classmethod
    def from_lengths(
        cls, lengths, *, numbers=None, tokens: int | None = None, length_limit: int | None = None, device=None
    ) -> Sequences:
        """Sequences of the given lengths (host integers, 0 allowed), numbered 0, 1, … or by `numbers` [S].

        `tokens` (default: the sum of the lengths) leaves inert places at the end; `length_limit` defaults to the
        longest of them.
        """
        lengths = tuple(int(length) for length in lengths)
        if any(length < 0 for length in lengths):
            raise ValueError(f"sequence lengths must not be negative, got {min(lengths)}")
        total = sum(lengths)
        tokens = total if tokens is None else tokens
        if total > tokens:
            raise ValueError(f"the sequences hold {total} tokens, more than the {tokens} places they are packed into")
        longest = max(lengths, default=0)
        length_limit = longest if length_limit is None else length_limit
        if longest > length_limit:
            raise ValueError(f"a sequence of {longest} tokens is longer than the limit of {length_limit}")
        if tokens >= 2**31:
            raise ValueError(f"a packed batch holds fewer than 2**31 tokens, got {tokens}")
        numbers = torch.arange(len(lengths)) if numbers is None else torch.as_tensor(numbers)
        if numbers.shape != (len(lengths),):
            raise ValueError(f"{len(lengths)} sequences want as many numbers, got shape {tuple(numbers.shape)}")
        cu_seqlens = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        return cls(cu_seqlens.to(device), numbers.to(device, torch.int64), lengths, tokens, length_limit)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, *, numbers=None, tokens: int | None = None) -> Sequences:
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
        return cls.from_lengths(lengths, numbers=numbers, tokens=tokens, device=cu_seqlens.device)

    @cached_property
    def longest(self) -> int:
        """Length of the longest sequence, 0 if there is none."""
        return max(self.lengths, default=0)

    @cached_property
    def used(self) -> int:
        """Places that belong to a sequence."""
        return sum(self.lengths)

    @cached_property
    def token_index(self) -> Tensor:
        """int64 [T]: the sequence that each place belongs to; inert places name the last one."""
        last = max(self.numbers.numel() - 1, 0)
        return torch.searchsorted(self.cu_seqlens[1:], self._places, right=True).clamp(max=last)

    @cached_property
    def position(self) -> Tensor:
        """int64 [T]: each place's position in its sequence; 0 at inert places."""
        places = self._places
        return torch.where(places < self.cu_seqlens[-1], places - self.cu_seqlens[self.token_index], 0).long()

    @cached_property
    def first(self) -> Tensor:
        """int64 [S]: the place of each sequence's first token; an empty one names some other place."""
        return self.cu_seqlens[:-1].long().clamp(max=self.tokens - 1)

    @cached_property
    def last(self) -> Tensor:
        """int64 [S]: the place of each sequence's last token; an empty one names some other place."""
        return (self.cu_seqlens[1:] - 1).long().clamp(min=0)

    @cached_property
    def token_number(self) -> Tensor:
        """int64 [T]: the number of the sequence that each place belongs to."""
        return self.numbers[self.token_index] if self.numbers.numel() else torch.zeros_like(self.position)

    @cached_property
    def tile_table(self) -> Tensor:
        """int32 [N + 1, 4]: the tiles of the attention kernels, see `bertfast.kernels.attention_tiles.tile_table`."""
        return tile_table(self.cu_seqlens, self.tokens, self.length_limit)

    @property
    def _places(self) -> Tensor:
        # What follows here is computed on the device from cu_seqlens, so that a captured step holds for other lengths.
        return torch.arange(self.tokens, dtype=torch.int32, device=self.cu_seqlens.device)

    def without_lengths(self) -> Sequences:
        """The same, but for the lengths on the host, which must not be asked for: those of other sequences may come."""
        return replace(self, lengths=_Unknown())

    def to(self, device, non_blocking: bool = False) -> Sequences:
        """The same sequences with their tensors on `device`."""
        return replace(
            self,
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
            numbers=self.numbers.to(device, non_blocking=non_blocking),
        )


class _Unknown(tuple):
    """Lengths that the host does not know."""

    def _asked(self, *arguments):
        raise RuntimeError("a step that is recorded for other batches asked for the lengths of this one")

    __iter__ = __len__ = __getitem__ = _asked
