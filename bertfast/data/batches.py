"""Packed batches of a fixed budget of tokens: bin `index` of step `step`, a pure function of the seed.

Bins follow one another over all epochs without end and a step takes the next `bins_per_step` of them. Samples are
numbered as the bins consume them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from bertfast.data.masking import Masker
from bertfast.data.packing import Epoch, Epochs
from bertfast.data.samples import Outline, Samples, Sampling
from bertfast.data.shards import Shards
from bertfast.data.tokenizer import SpecialTokens
from bertfast.ops.reference import IGNORED
from bertfast.ops.sequences import Sequences


@dataclass(frozen=True, eq=False)
class Batch:
    """One packed bin; T, S and M, the room for tokens, sequences and masked tokens, are the same for all bins of a run.

    Attributes:
        token_ids: int64 [T], masked; [PAD] in padding slots.
        token_type_ids: int64 [T], 0 for [CLS] A [SEP], 1 for B [SEP].
        position_ids: int64 [T], positions in the sequence; 0 in padding slots.
        sequences: S sequences, the unused ones empty, numbered by the samples consumed since the run began.
        masked_rows: int64 [M], the slot of each masked token, ascending; where unused, other slots, each once:
            gathering one row many times would serialise the gradient's scatter.
        labels: int64 [M], its original token; -100 where unused.
        next_sentence_labels: int64 [S], 0 where B follows A, 1 where it is from another document, -100 where unused;
            None where samples are not pairs.
        masked: how many of the M are used (known to the host).
    """

    token_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    sequences: Sequences
    masked_rows: Tensor
    labels: Tensor
    next_sentence_labels: Tensor | None
    masked: int

    @property
    def num_tokens(self) -> int:
        """Number of slots that hold a token."""
        return self.sequences.num_tokens

    def to(self, device, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in pinned host memory, from where `to(device, non_blocking=True)` does not wait."""
        return self._each(Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the batch."""
        return [*_tensors_of(self).values(), *_tensors_of(self.sequences).values()]

    def options(self) -> tuple[int, ...]:
        """Return the integers, besides shapes, on which the operations of a step depend."""
        return (self.sequences.max_seqlen_bound,)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        sequences = replace(self.sequences, **{name: change(x) for name, x in _tensors_of(self.sequences).items()})
        return replace(self, **{name: change(x) for name, x in _tensors_of(self).items()}, sequences=sequences)


def _tensors_of(holder: Batch | Sequences) -> dict[str, Tensor]:
    values = {field.name: getattr(holder, field.name) for field in fields(holder)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class Batches:
    """The endless row of a run's bins, epoch after epoch, each with new pairs, a new order and new masks.

    Args:
        shards: The corpus.
        special: The tokenizer's special tokens.
        continuation: bool [V], the tokens that go on with a word.
        sampling: How samples are cut and masked.
        tokens_per_bin: T, the places of a bin.
        bins_per_step: How many bins make a step of the optimizer, over all ranks.
        seed: An integer of 64 bits, from 0 on, that decides everything random here.

    Attributes:
        epochs: The plan behind the bins, with their `capacity`.
        steps_per_epoch: Steps that see all of the first epoch; later ones differ a little, as pairs do.

    Raises ValueError where the arguments do not fit together. Planning an epoch takes about a second for 50 million
    tokens; a run that resumes plans all epochs before that step once more.
    """

    def __init__(
        self,
        shards: Shards,
        special: SpecialTokens,
        continuation: np.ndarray,
        sampling: Sampling,
        *,
        tokens_per_bin: int,
        bins_per_step: int,
        seed: int,
    ):
        if tokens_per_bin < sampling.max_seq_length:
            raise ValueError(
                f"a bin of {tokens_per_bin} tokens cannot hold a sample of {sampling.max_seq_length}: "
                "raise tokens_per_bin or lower max_seq_length"
            )
        if bins_per_step < 1:
            raise ValueError(f"a step takes at least one bin, got {bins_per_step}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"the seed must be at least 0 and below 2**64, got {seed}")
        if len(continuation) != shards.vocabulary_size:
            raise ValueError(
                f"the tokenizer has {len(continuation)} tokens and the shards in {shards.folder} were made with "
                f"{shards.vocabulary_size}: prepare the text again with this tokenizer"
            )
        self.special, self.pairs, self.bins_per_step = special, sampling.pairs, bins_per_step
        self.max_seq_length = sampling.max_seq_length
        self.masker = Masker(special, continuation, sampling, seed)
        self.tokens = [part.tokens.view(np.ndarray) for part in shards.parts]  # quicker to slice than a memmap
        self.part_starts = np.cumsum([0, *(tokens.size for tokens in self.tokens)])
        self.epochs = Epochs(Outline.of(shards), sampling, tokens_per_bin, seed)
        self.steps_per_epoch = -(-self.epochs[0].bins // bins_per_step)

    def bin(self, step: int, index: int) -> Batch:
        """Bin `index` of step `step`, both from 0: the same in whatever order and on whatever rank it is asked for."""
        if step < 0 or not 0 <= index < self.bins_per_step:
            raise ValueError(
                f"step {step} has no bin {index}: steps count from 0, their bins to {self.bins_per_step - 1}"
            )
        return self.numbered(step * self.bins_per_step + index)

    def numbered(self, number: int) -> Batch:
        """Bin `number` of the endless row, from 0."""
        epoch = self.epochs.of_bin(number)
        return self._assemble(epoch, number - epoch.bins_before)

    def first_epoch(self, limit: int | None = None) -> Iterator[Batch]:
        """The first epoch's bins, at most `limit`: of held-out shards, a validation set that is the same every time."""
        epoch = self.epochs[0]
        for number in range(epoch.bins if limit is None else min(limit, epoch.bins)):
            yield self._assemble(epoch, number)

    def _assemble(self, epoch: Epoch, number: int) -> Batch:
        """Bin `number` of `epoch`, from 0."""
        capacity = self.epochs.capacity
        rows = slice(*epoch.bin_starts[number : number + 2].tolist())
        first_number = epoch.samples_before + rows.start
        samples = epoch.samples.take(rows)
        token_ids, token_type_ids, lengths = self._texts(samples)
        starts = np.cumsum(lengths) - lengths
        masked = self.masker(token_ids, lengths, first_number)
        return Batch(
            token_ids=_filled(masked.token_ids, capacity.tokens, self.special.pad),
            token_type_ids=_filled(token_type_ids, capacity.tokens, 0),
            position_ids=_filled(np.arange(token_ids.size) - np.repeat(starts, lengths), capacity.tokens, 0),
            sequences=Sequences.from_lengths(
                _filled(lengths, capacity.sequences, 0).tolist(),
                sequence_ids=torch.arange(first_number, first_number + capacity.sequences),
                capacity=capacity.tokens,
                max_seqlen_bound=self.max_seq_length,
            ),
            masked_rows=_filled(masked.rows, capacity.masked, _other_slots(masked.rows, capacity.tokens)),
            labels=_filled(masked.labels, capacity.masked, IGNORED),
            next_sentence_labels=_filled(samples.random_second, capacity.sequences, IGNORED) if self.pairs else None,
            masked=masked.rows.size,
        )

    def _texts(self, samples: Samples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 token ids [T], token types [T] and lengths [S] of [CLS] A [SEP] B [SEP], or [CLS] A [SEP], in a row."""
        segments = 2 if self.pairs else 1
        starts = np.stack([samples.first_start, samples.second_start][:segments], 1).ravel()
        texts = np.stack([samples.first_length, samples.second_length][:segments], 1).ravel().astype(np.int64)
        lengths = texts + 1
        lengths[::segments] += 1
        ends = np.cumsum(lengths)

        token_ids = np.empty(ends[-1], np.int64)
        token_ids[(ends - lengths)[::segments]] = self.special.cls
        token_ids[ends - 1] = self.special.sep
        parts = np.searchsorted(self.part_starts, starts, side="right") - 1
        table = np.stack([parts, starts - self.part_starts[parts], texts, ends - 1 - texts], 1)
        for part, start, text, place in table.tolist():
            token_ids[place : place + text] = self.tokens[part][start : start + text]
        token_type_ids = np.repeat(np.arange(ends.size) % segments, lengths)
        return token_ids, token_type_ids, lengths.reshape(-1, segments).sum(1)


def _filled(values: np.ndarray, size: int, rest: int | np.ndarray) -> Tensor:
    """int64 [size]: `values`, then `rest`, an integer or the first of several, in every slot left."""
    result = np.empty(size, np.int64)
    result[: values.size] = values
    result[values.size :] = np.resize(rest, size - values.size)
    return torch.from_numpy(result)


def _other_slots(rows: np.ndarray, capacity: int) -> np.ndarray:
    """Return the slots below `capacity` that are not among `rows`, ascending; all of them if none is left."""
    free = np.ones(capacity, bool)
    free[rows] = False
    return np.flatnonzero(free) if free.any() else np.arange(capacity)
