"""Packed batches with a fixed token budget; each is a pure function of (seed, step, index).

The bins of all epochs form one endless sequence, of which each step takes the next `bins_per_step`. Samples are
numbered in the order in which the bins consume them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bertfast.data.masking import Masker
from bertfast.data.packing import Epoch, Epochs
from bertfast.data.samples import CorpusBoundaries, Samples, Sampling
from bertfast.data.shards import Shards
from bertfast.data.special_tokens import SpecialTokens
from bertfast.ops.reference import IGNORE_INDEX
from bertfast.ops.sequences import Sequences


@dataclass(frozen=True, eq=False)
class Batch:
    """One packed bin with T token slots, S sequence slots and M masked-token slots, equal for all bins of a run.

    Attributes:
        token_ids: int64 [T], after masking; [PAD] in padding slots.
        token_type_ids: int64 [T], 0 for [CLS] A [SEP], 1 for B [SEP].
        position_ids: int64 [T], positions within the sequence; 0 in padding slots.
        sequences: S sequences, unused ones empty; sequence ids count the samples consumed since the run began.
        masked_rows: int64 [M], the slot of each masked token, ascending; unused entries name distinct other slots,
            because gathering one row many times would serialise the scatter of the gradient.
        labels: int64 [M], the original token ids; -100 in unused slots.
        next_sentence_labels: int64 [S], 0 if B follows A, 1 if it is from elsewhere, -100 in unused slots; None if
            samples are not sentence pairs.
        masked: Number of masked tokens, at most M, known to the host.
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
        """Number of token slots in use."""
        return self.sequences.num_tokens

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in pinned host memory, which `to(device, non_blocking=True)` copies asynchronously."""
        return self._map(Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the batch, those of its sequences included."""
        return [*_tensors_of(self).values(), *_tensors_of(self.sequences).values()]

    def options(self) -> tuple[int, ...]:
        """Return the integers, besides shapes, that the operations of a step depend on."""
        return (self.sequences.max_seqlen_bound,)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        mapped: dict[str, Any] = {name: function(x) for name, x in _tensors_of(self).items()}
        mapped_sequences: dict[str, Any] = {name: function(x) for name, x in _tensors_of(self.sequences).items()}
        return replace(self, **mapped, sequences=replace(self.sequences, **mapped_sequences))


def _tensors_of(holder: Batch | Sequences) -> dict[str, Tensor]:
    values = {field.name: getattr(holder, field.name) for field in fields(holder)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class Batches:
    """The endless sequence of a run's bins: each epoch has new sentence pairs, a new order and new masks.

    Args:
        shards: The corpus.
        special: The tokenizer's special tokens.
        continuation: bool [V], True for tokens that continue a word ("##…").
        sampling: How samples are cut and masked.
        tokens_per_bin: T, the token slots of a bin.
        bins_per_step: Bins per optimizer step, over all ranks.
        seed: Integer from 0 to 2**64 - 1 that determines everything random here.

    Attributes:
        epochs: The epochs that the bins are taken from, with their `capacity`.
        steps_per_epoch: Steps of the first epoch; later epochs differ slightly, as their sentence pairs do.

    Raises:
        ValueError: The arguments contradict each other.

    Planning an epoch takes about a second per 50 million tokens. A resumed run plans all earlier epochs again.
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
                "raise --tokens-per-batch or lower --max-seq-length"
            )
        if bins_per_step < 1:
            raise ValueError(f"a step needs at least one bin, got {bins_per_step}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"the seed must be at least 0 and below 2**64, got {seed}")
        if len(continuation) != shards.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(continuation)} tokens and the shards in {shards.folder} were made with "
                f"{shards.vocab_size}: run `bertfast prepare` again with this tokenizer"
            )
        self.special, self.pairs, self.bins_per_step = special, sampling.pairs, bins_per_step
        self.max_seq_length = sampling.max_seq_length
        self.masker = Masker(special, continuation, sampling, seed)
        self.tokens = [part.tokens.view(np.ndarray) for part in shards.parts]  # slices faster than a memmap
        self.part_starts = np.cumsum([0, *(tokens.size for tokens in self.tokens)])
        self.epochs = Epochs(CorpusBoundaries.of(shards), sampling, tokens_per_bin, seed)
        self.steps_per_epoch = -(-self.epochs[0].bins // bins_per_step)

    def bin(self, step: int, index: int) -> Batch:
        """Return bin `index` of step `step`, both counted from 0, independently of earlier calls and of the rank."""
        if step < 0 or not 0 <= index < self.bins_per_step:
            raise ValueError(
                f"step {step} has no bin {index}: steps count from 0, their bins from 0 to {self.bins_per_step - 1}"
            )
        return self.nth_bin(step * self.bins_per_step + index)

    def nth_bin(self, index: int) -> Batch:
        """Return bin `index` of the endless sequence, counted from 0."""
        epoch = self.epochs.of_bin(index)
        return self._assemble(epoch, index - epoch.bins_before)

    def first_epoch(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield at most `limit` bins of the first epoch: of held-out shards, a fixed validation set."""
        epoch = self.epochs[0]
        for index in range(epoch.bins if limit is None else min(limit, epoch.bins)):
            yield self._assemble(epoch, index)

    def _assemble(self, epoch: Epoch, index: int) -> Batch:
        """Return bin `index` of `epoch`, counted from 0."""
        capacity = self.epochs.capacity
        rows = slice(*epoch.bin_starts[index : index + 2].tolist())
        first_number = epoch.samples_before + rows.start
        samples = epoch.samples.take(rows)
        token_ids, token_type_ids, lengths = self._tokens_of(samples)
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
            labels=_filled(masked.labels, capacity.masked, IGNORE_INDEX),
            next_sentence_labels=_filled(samples.random_second, capacity.sequences, IGNORE_INDEX)
            if self.pairs
            else None,
            masked=masked.rows.size,
        )

    def _tokens_of(self, samples: Samples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the tokens of samples, [CLS] A [SEP] B [SEP] or [CLS] A [SEP], end to end.

        Returns:
            Token ids int64 [T], token types int64 [T] and sequence lengths int64 [S].
        """
        # Per segment, in the order A0, B0, A1, B1, … (or A0, A1, …): starts in the corpus, tokens of text, and lengths
        # with the special tokens, [SEP] after every segment and [CLS] before the first one of each sample.
        segments = 2 if self.pairs else 1
        starts = np.stack([samples.first_start, samples.second_start][:segments], 1).ravel()
        texts = np.stack([samples.first_length, samples.second_length][:segments], 1).ravel().astype(np.int64)
        lengths = texts + 1
        lengths[::segments] += 1
        ends = np.cumsum(lengths)

        token_ids = np.empty(ends[-1], np.int64)
        token_ids[(ends - lengths)[::segments]] = self.special.cls
        token_ids[ends - 1] = self.special.sep
        # One row per segment: its part of the corpus, its start there, its tokens, and its first slot in the bin.
        parts = np.searchsorted(self.part_starts, starts, side="right") - 1
        table = np.stack([parts, starts - self.part_starts[parts], texts, ends - 1 - texts], 1)
        for part, start, text, slot in table.tolist():
            token_ids[slot : slot + text] = self.tokens[part][start : start + text]
        token_type_ids = np.repeat(np.arange(ends.size) % segments, lengths)
        return token_ids, token_type_ids, lengths.reshape(-1, segments).sum(1)


def _filled(values: np.ndarray, size: int, rest: int | np.ndarray) -> Tensor:
    """Return int64 [size]: `values`, then `rest`, an integer or the first of several, in the remaining slots."""
    result = np.empty(size, np.int64)
    result[: values.size] = values
    result[values.size :] = np.resize(rest, size - values.size)
    return torch.from_numpy(result)


def _other_slots(rows: np.ndarray, capacity: int) -> np.ndarray:
    """Return the slots below `capacity` that are not among `rows`, ascending; all of them if none is left."""
    free = np.ones(capacity, bool)
    free[rows] = False
    return np.flatnonzero(free) if free.any() else np.arange(capacity)
