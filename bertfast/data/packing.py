"""Packing of samples into bins with fixed budgets of tokens, sequences and masked tokens, epoch after epoch."""

from __future__ import annotations

from bisect import bisect_right
from itertools import count
from math import ceil
from typing import NamedTuple

import numpy as np

from bertfast.data.masking import mask_counts
from bertfast.data.samples import CorpusBoundaries, Samples, Sampling, plan_samples

# Number of bins that are open at the same time: more are filled better, fewer preserve the order of the samples better.
OPEN_BINS = 16


class Capacity(NamedTuple):
    """Slots of a bin: for tokens, sequences and masked tokens."""

    tokens: int
    sequences: int
    masked: int

    @classmethod
    def for_samples(cls, tokens: int, mean_length: float, share: float) -> Capacity:
        """Return a capacity whose sequence and masked-token slots practically never run out before the tokens do.

        Args:
            tokens: Token slots of a bin.
            mean_length: Mean length of the samples in tokens.
            share: Largest share of a sample's tokens that is masked. [CLS] and [SEP] are never masked, so this share of
                all tokens suffices although the counts per sample are rounded.
        """
        sequences = 1.25 * tokens / mean_length + 8
        return cls(tokens, _multiple_of_8(sequences), _multiple_of_8(share * tokens))


def pack(lengths: np.ndarray, masked: np.ndarray, capacity: Capacity) -> np.ndarray:
    """Assign samples to bins: first fit, with at most OPEN_BINS open bins.

    A sample goes to the first open bin that it fits into; if there is none, a new bin is opened and the oldest one is
    closed. So no sample is dropped, short samples fill gaps, and the order is nearly preserved.

    Args:
        lengths: int64 [N], tokens of each sample; each fits into an empty bin.
        masked: int64 [N], masked tokens of each sample.
        capacity: Slots of a bin.

    Returns:
        int64 [N], the bin of each sample, counted from 0.
    """
    bins = np.empty(lengths.size, np.int64)
    numbers = count()
    open_bins: list[list[int]] = []  # per bin: [free token slots, free sequence slots, free masked-token slots, number]
    for sample, (length, num_masked) in enumerate(zip(lengths.tolist(), masked.tolist(), strict=True)):
        for free in open_bins:
            if length <= free[0] and free[1] and num_masked <= free[2]:
                break
        else:
            if len(open_bins) == OPEN_BINS:
                del open_bins[0]
            free = [*capacity, next(numbers)]
            open_bins.append(free)
        free[0] -= length
        free[1] -= 1
        free[2] -= num_masked
        bins[sample] = free[3]
    return bins


class Epoch(NamedTuple):
    """One pass over the corpus, with the samples in the order of the bins.

    Attributes:
        samples: N samples.
        bin_starts: int64 [bins + 1]; bin `i` holds samples `bin_starts[i]` to `bin_starts[i + 1]`.
        bins_before: Number of bins of all earlier epochs.
        samples_before: Number of samples of all earlier epochs.
    """

    samples: Samples
    bin_starts: np.ndarray
    bins_before: int
    samples_before: int

    @property
    def bins(self) -> int:
        """Number of bins; the last one may be only partly filled."""
        return self.bin_starts.size - 1


class Epochs:
    """The epochs of a run, each with new sentence pairs in a new order, packed into bins of the same capacity.

    An epoch is planned on first access, after all epochs before it, because their counts determine its first bin. The
    two planned last are cached, so crossing the boundary of two epochs plans nothing twice.

    Args:
        boundaries: The sentences and documents of the corpus.
        sampling: How samples are cut and masked.
        tokens_per_bin: Token slots of a bin.
        seed: Seed of the run.

    Attributes:
        capacity: Slots of every bin, from the first epoch's mean sample length.
    """

    def __init__(self, boundaries: CorpusBoundaries, sampling: Sampling, tokens_per_bin: int, seed: int):
        self.boundaries, self.sampling, self.seed = boundaries, sampling, seed
        samples = self._samples(0)
        mean_length = samples.lengths(sampling).mean()
        self.capacity = Capacity.for_samples(tokens_per_bin, mean_length, sampling.max_predicted_share)
        self._bins_before, self._samples_before = [0], [0]  # by epoch; the last entry is that of the next one to plan
        self._cached: dict[int, Epoch] = {}
        self._plan(0, samples)

    def __getitem__(self, index: int) -> Epoch:
        """Return epoch `index`, counted from 0."""
        for needed in (*range(len(self._bins_before) - 1, index), index):
            if needed not in self._cached:
                self._plan(needed, self._samples(needed))
        return self._cached[index]

    def of_bin(self, index: int) -> Epoch:
        """Return the epoch that contains bin `index` of the run, counted from 0."""
        while index >= self._bins_before[-1]:
            self[len(self._bins_before) - 1]  # plans the next epoch
        return self[bisect_right(self._bins_before, index) - 1]

    def _samples(self, index: int) -> Samples:
        return plan_samples(self.boundaries, self.sampling, np.random.default_rng([self.seed, index]))

    def _plan(self, index: int, samples: Samples) -> None:
        """Pack the samples of an epoch, and cache it."""
        lengths, text = samples.lengths(self.sampling), samples.first_length + samples.second_length
        bins = pack(lengths, mask_counts(text, self.sampling), self.capacity)
        bin_starts = np.concatenate([[0], np.cumsum(np.bincount(bins))])
        samples = samples.take(np.argsort(bins, kind="stable"))  # in the order of the bins
        epoch = Epoch(samples, bin_starts, self._bins_before[index], self._samples_before[index])
        if index == len(self._bins_before) - 1:
            self._bins_before.append(epoch.bins_before + epoch.bins)
            self._samples_before.append(epoch.samples_before + bins.size)
        if len(self._cached) == 2:
            del self._cached[next(iter(self._cached))]
        self._cached[index] = epoch


def _multiple_of_8(value: float) -> int:
    """Round up to a multiple of 8, which GEMM kernels are fastest with; at least 8."""
    return max(ceil(value / 8), 1) * 8
