"""Which samples share a bin, epoch after epoch: a fixed budget of tokens, of sequences and of masked tokens."""

from __future__ import annotations

from bisect import bisect_right
from itertools import count
from math import ceil
from typing import NamedTuple

import numpy as np

from bertfast.data.masking import mask_counts
from bertfast.data.samples import Outline, Samples, Sampling, plan_samples

# Bins that are open at a time: more fill better, fewer keep the samples closer to the order given.
OPEN_BINS = 16


class Capacity(NamedTuple):
    """What a bin has room for, in tokens, sequences and masked tokens."""

    tokens: int
    sequences: int
    masked: int

    @classmethod
    def for_samples(cls, tokens: int, mean_length: float, share: float) -> Capacity:
        """Room that bins of `tokens` practically never outgrow when samples have this length on average.

        [CLS] and [SEP] are never masked, so `share` of all tokens is enough even though counts are rounded.
        """
        sequences = 1.25 * tokens / mean_length + 8
        return cls(tokens, _multiple_of_8(sequences), _multiple_of_8(share * tokens))


def pack(lengths: np.ndarray, masked: np.ndarray, capacity: Capacity) -> np.ndarray:
    """int64 [N]: the bin, from 0, of each sample of `lengths` [N] tokens, `masked` [N] of them masked.

    A sample goes to the first open bin that has room for it; where none has, a new one opens and the oldest closes.
    So nothing is left out, gaps are filled by the short samples that come along, and the order stays nearly the same.
    A sample must fit into an empty bin.
    """
    bins = np.empty(lengths.size, np.int64)
    numbers = count()
    opened = []  # a bin each: [free tokens, free sequences, free masked tokens, number]
    for sample, (length, hidden) in enumerate(zip(lengths.tolist(), masked.tolist(), strict=True)):
        for free in opened:
            if length <= free[0] and free[1] and hidden <= free[2]:
                break
        else:
            if len(opened) == OPEN_BINS:
                del opened[0]
            free = [*capacity, next(numbers)]
            opened.append(free)
        free[0] -= length
        free[1] -= 1
        free[2] -= hidden
        bins[sample] = free[3]
    return bins


class Epoch(NamedTuple):
    """One pass over the corpus, its samples in the order of the bins.

    Attributes:
        samples: N samples.
        bin_starts: int64 [bins + 1]; bin `i` holds samples `bin_starts[i]` to `bin_starts[i + 1]`.
        bins_before: bins of all earlier epochs.
        samples_before: samples of all earlier epochs.
    """

    samples: Samples
    bin_starts: np.ndarray
    bins_before: int
    samples_before: int

    @property
    def bins(self) -> int:
        """How many bins the epoch fills; the last one is as full as the samples left for it."""
        return self.bin_starts.size - 1


class Epochs:
    """The epochs of a run, each with new pairs in a new order, packed into bins of one capacity.

    Epochs are planned when they are asked for, with all before them, since only their counts say where one begins; the
    two planned last are kept, so that walking over the end of one plans nothing twice.
    """

    def __init__(self, outline: Outline, sampling: Sampling, tokens_per_bin: int, seed: int):
        self.outline, self.sampling, self.seed = outline, sampling, seed
        samples = self._samples(0)
        mean_length = samples.lengths(sampling).mean()
        self.capacity = Capacity.for_samples(tokens_per_bin, mean_length, sampling.predicted_share)
        self._bins_before, self._samples_before = [0], [0]  # of each epoch planned so far, and of the next
        self._kept: dict[int, Epoch] = {}
        self._keep(0, samples)

    def __getitem__(self, number: int) -> Epoch:
        """Epoch `number`, from 0."""
        for needed in (*range(len(self._bins_before) - 1, number), number):
            if needed not in self._kept:
                self._keep(needed, self._samples(needed))
        return self._kept[number]

    def of_bin(self, number: int) -> Epoch:
        """The epoch that holds the run's bin `number`, from 0."""
        while number >= self._bins_before[-1]:
            self[len(self._bins_before) - 1]
        return self[bisect_right(self._bins_before, number) - 1]

    def _samples(self, number: int) -> Samples:
        return plan_samples(self.outline, self.sampling, np.random.default_rng([self.seed, number]))

    def _keep(self, number: int, samples: Samples) -> None:
        lengths, text = samples.lengths(self.sampling), samples.first_length + samples.second_length
        bins = pack(lengths, mask_counts(text, self.sampling), self.capacity)
        bin_starts = np.concatenate([[0], np.cumsum(np.bincount(bins))])
        samples = samples.take(np.argsort(bins, kind="stable"))
        epoch = Epoch(samples, bin_starts, self._bins_before[number], self._samples_before[number])
        if number == len(self._bins_before) - 1:
            self._bins_before.append(epoch.bins_before + epoch.bins)
            self._samples_before.append(epoch.samples_before + bins.size)
        if len(self._kept) == 2:
            del self._kept[next(iter(self._kept))]
        self._kept[number] = epoch


def _multiple_of_8(number: float) -> int:
    """The next multiple of 8, which matrix products like."""
    return max(ceil(number / 8), 1) * 8
