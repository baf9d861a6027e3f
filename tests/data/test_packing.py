"""Packing drops no sample, respects and fills the capacity of bins, and nearly preserves the order."""

import numpy as np
import pytest

from bertfast.data.packing import OPEN_BINS, Capacity, Epochs, pack
from bertfast.data.samples import CorpusBoundaries, Sampling


@pytest.mark.parametrize(
    ("capacity", "scarce"), [(Capacity(512, 99, 999), 0), (Capacity(999, 3, 999), 1), (Capacity(999, 99, 40), 2)]
)
def test_no_capacity_is_exceeded_and_every_sample_has_a_bin(capacity, scarce):
    generator = np.random.default_rng(0)
    lengths, masked = generator.integers(5, 129, 3000), generator.integers(1, 21, 3000)
    bins = pack(lengths, masked, capacity)
    assert bins.shape == lengths.shape
    assert set(bins) == set(range(bins.max() + 1))
    loads = [np.bincount(bins, weights) for weights in (lengths, np.ones(3000), masked)]
    assert all(load.max() <= limit for load, limit in zip(loads, capacity, strict=True))
    assert loads[scarce].mean() > 0.95 * capacity[scarce]


def test_the_order_is_nearly_preserved():
    lengths = np.random.default_rng(0).integers(5, 129, 3000)
    rank = np.argsort(np.argsort(pack(lengths, np.ones(3000, int), Capacity(512, 100, 100)), kind="stable"))
    assert np.abs(rank - np.arange(3000)).mean() < 10 * OPEN_BINS


def test_samples_of_equal_length_fill_bins_completely():
    bins = pack(np.full(1000, 64), np.full(1000, 9), Capacity(512, 8, 72))
    assert (np.bincount(bins) == 8).all()


def test_bins_and_samples_are_numbered_across_epochs(prose):
    epochs = Epochs(CorpusBoundaries.of(prose), Sampling(), 4096, seed=0)
    bins = samples = 0
    for number in range(5):
        epoch = epochs[number]
        assert (epoch.bins_before, epoch.samples_before) == (bins, samples)
        bins, samples = bins + epoch.bins, samples + epoch.samples.first_start.size
        assert epochs.of_bin(epoch.bins_before) is epoch
        assert epochs.of_bin(bins - 1) is epoch
        assert epoch.bin_starts[-1] == epoch.samples.first_start.size


def test_an_epoch_does_not_depend_on_the_order_of_access(prose):
    walked = Epochs(CorpusBoundaries.of(prose), Sampling(), 4096, seed=0)
    visited = [walked[number] for number in (0, 1, 2, 3, 1)]
    fresh = Epochs(CorpusBoundaries.of(prose), Sampling(), 4096, seed=0)
    for epoch, number in zip(visited[::-1], (1, 3, 2, 1, 0), strict=True):
        other = fresh[number]
        assert (other.bins_before, other.samples_before) == (epoch.bins_before, epoch.samples_before)
        assert (other.bin_starts == epoch.bin_starts).all()
        assert all((a == b).all() for a, b in zip(other.samples, epoch.samples, strict=True))
    assert len(fresh._cached) == 2, "older epochs are dropped from the cache"


def test_each_epoch_has_new_pairs(prose):
    epochs = Epochs(CorpusBoundaries.of(prose), Sampling(), 4096, seed=0)
    first, second = (set(zip(*(column.tolist() for column in epochs[n].samples[:4]), strict=True)) for n in (0, 1))
    assert len(first & second) < 0.2 * len(first)


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm"])
@pytest.mark.parametrize("sentences", [[8], [3, 9], [30, 9, 14]])
def test_bins_are_full_for_all_document_lengths(make_shards, objective, sentences):
    """Even for documents far shorter than a sample, the sequence slots suffice to fill a bin."""
    shards = make_shards([sentences] * 4000)
    sampling = Sampling(max_seq_length=512, objective=objective)
    epoch = Epochs(CorpusBoundaries.of(shards), sampling, 4096, seed=0)[0]
    num_tokens = np.add.reduceat(epoch.samples.lengths(sampling), epoch.bin_starts[:-1])
    assert np.sort(num_tokens)[1:].mean() / 4096 > 0.98
