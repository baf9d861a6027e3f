"""Masking: how many tokens, which ones, what replaces them, and no leak of labels."""

import numpy as np
import pytest

from bertfast.data.masking import Masker, mask_counts
from bertfast.data.samples import Sampling

VOCAB_SIZE = 40
ORDINARY = np.arange(5, VOCAB_SIZE)
NO_CONTINUATION = np.zeros(VOCAB_SIZE, bool)
CONTINUATION = np.arange(VOCAB_SIZE) >= 25


def packed(special, text_lengths, seed=0):
    """Return token ids and lengths of random [CLS] A [SEP] B [SEP] samples with these text lengths."""
    generator, pieces = np.random.default_rng(seed), []
    for length in text_lengths:
        text, split = generator.choice(ORDINARY, length), generator.integers(0, length + 1)
        pieces.append([special.cls, *text[:split], special.sep, *text[split:], special.sep])
    return np.concatenate(pieces), np.array([len(piece) for piece in pieces])


def many(special):
    return packed(special, np.random.default_rng(3).integers(1, 126, 2000))


def test_labels_are_the_original_tokens_and_nothing_else_changes(special):
    token_ids, lengths = many(special)
    original = token_ids.copy()
    masked = Masker(special, NO_CONTINUATION, Sampling(), seed=0)(token_ids, lengths, 0)
    assert (token_ids == original).all(), "the caller's array is not modified"
    assert (masked.labels == original[masked.rows]).all()
    assert (np.diff(masked.rows) > 0).all()
    elsewhere = np.delete(np.arange(original.size), masked.rows)
    assert (masked.token_ids[elsewhere] == original[elsewhere]).all()
    assert not np.isin(masked.labels, [special.cls, special.sep]).any()


@pytest.mark.parametrize("probability", [0.15, 0.4, 0.01, 1.0])
def test_each_sample_has_exactly_the_rounded_share_masked(special, probability):
    token_ids, lengths = many(special)
    masked = Masker(special, NO_CONTINUATION, Sampling(mlm_probability=probability), seed=0)(token_ids, lengths, 0)
    sample = np.repeat(np.arange(lengths.size), lengths)
    expected = [max(1, round(probability * (length - 3))) for length in lengths.tolist()]
    assert np.bincount(sample[masked.rows], minlength=lengths.size).tolist() == expected


def test_no_more_tokens_are_masked_than_can_be():
    assert mask_counts(np.array([0, 1, 2, 10, 100]), Sampling()).tolist() == [0, 1, 1, 2, 15]


def test_every_position_is_masked_equally_often(special):
    samples = 4000
    token_ids, lengths = packed(special, [61] * samples)
    token_ids = np.where(np.isin(token_ids, [special.cls, special.sep]), 5, token_ids)  # all maskable: 64 a sample
    masked = Masker(special, NO_CONTINUATION, Sampling(), seed=0)(token_ids, lengths, 0)
    share = np.bincount(masked.rows % 64, minlength=64) / samples
    expected = round(0.15 * 64) / 64
    assert np.abs(share - expected).max() < 5 * np.sqrt(expected * (1 - expected) / samples)


@pytest.mark.parametrize(("mask", "random"), [(0.8, 0.1), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_masked_tokens_are_replaced_by_mask_or_random_tokens_or_kept(special, mask, random):
    token_ids, lengths = many(special)
    sampling = Sampling(mask_replace_prob=mask, random_replace_prob=random)
    masked = Masker(special, NO_CONTINUATION, sampling, seed=0)(token_ids, lengths, 0)
    seen, count = masked.token_ids[masked.rows], masked.rows.size
    unchanged = random / ORDINARY.size  # a random token may equal the original
    for found, expected in [
        ((seen == special.mask).mean(), mask),
        (((seen != special.mask) & (seen != masked.labels)).mean(), random - unchanged),
        ((seen == masked.labels).mean(), 1 - mask - random + unchanged),
    ]:
        assert abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 1e-12


def test_random_tokens_are_uniform_over_all_but_special_ones(special):
    token_ids, lengths = many(special)
    sampling = Sampling(mask_replace_prob=0, random_replace_prob=1)
    masked = Masker(special, NO_CONTINUATION, sampling, seed=0)(token_ids, lengths, 0)
    drawn = np.bincount(masked.token_ids[masked.rows], minlength=VOCAB_SIZE)
    assert not drawn[:5].any()
    share, expected = drawn[5:] / drawn.sum(), 1 / ORDINARY.size
    assert np.abs(share - expected).max() < 5 * np.sqrt(expected / drawn.sum())


@pytest.mark.parametrize("whole_word", [False, True])
def test_masks_depend_on_seed_and_sample_number_alone(special, whole_word):
    """The other samples do not matter; another number or seed gives another mask."""
    token_ids, lengths = packed(special, [60, 7, 60, 100])
    sampling = Sampling(whole_word=whole_word)
    masker = Masker(special, CONTINUATION, sampling, seed=5)
    together = masker(token_ids, lengths, 40)
    starts = np.cumsum(lengths) - lengths
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        sample = token_ids[start : start + length]
        alone = masker(sample, lengths[index : index + 1], 40 + index)
        assert (alone.token_ids == together.token_ids[start : start + length]).all()
        inside = (together.rows >= start) & (together.rows < start + length)
        assert (alone.rows == together.rows[inside] - start).all()
    last = masker(sample, lengths[3:], 43)
    assert last.rows.tolist() != masker(sample, lengths[3:], 44).rows.tolist()
    assert last.rows.tolist() != Masker(special, CONTINUATION, sampling, seed=6)(sample, lengths[3:], 43).rows.tolist()


def test_whole_words_are_masked_whole(special):
    token_ids, lengths = many(special)
    masked = Masker(special, CONTINUATION, Sampling(whole_word=True), seed=0)(token_ids, lengths, 0)
    is_masked = np.zeros(token_ids.size, bool)
    is_masked[masked.rows] = True
    bounds = np.isin(token_ids, [special.cls, special.sep])
    word_starts = ~CONTINUATION[token_ids] | bounds | np.roll(bounds, 1)
    word = np.cumsum(word_starts) - 1
    size, masked_size = np.bincount(word), np.bincount(word, is_masked)

    sample = np.repeat(np.arange(lengths.size), lengths)
    counts, targets = np.bincount(sample, is_masked), mask_counts(lengths - 3, Sampling())
    assert (counts <= targets).all()
    assert (counts >= 1).all()
    assert counts.sum() > 0.93 * targets.sum()
    # A partly masked word is the only masked one, and all words of its sample are longer than the target.
    shortest = np.full(lengths.size, lengths.max())
    np.minimum.at(shortest, sample[~bounds], size[word[~bounds]])
    cut = (masked_size > 0) & (masked_size < size)
    of_cut = sample[word_starts][cut]
    assert (counts[of_cut] == masked_size[cut]).all()
    assert (shortest[of_cut] > targets[of_cut]).all()


def test_every_token_belongs_to_a_word_that_can_be_masked(special):
    """A truncated text may start inside a word; that piece then counts as a word."""
    token_ids, lengths = many(special)
    masker = Masker(special, CONTINUATION, Sampling(whole_word=True, mlm_probability=1), seed=0)
    assert masker(token_ids, lengths, 0).rows.size == (lengths - 3).sum()


def test_a_sample_without_maskable_tokens_is_accepted(special):
    token_ids, lengths = np.array([special.cls, special.sep, special.sep]), np.array([3])
    masked = Masker(special, NO_CONTINUATION, Sampling(), seed=0)(token_ids, lengths, 0)
    assert masked.rows.size == 0
    assert (masked.token_ids == token_ids).all()


def test_causal_lm_predicts_every_token_but_the_first(special):
    token_ids, lengths = many(special)
    sampling = Sampling(objective="ltr")
    masked = Masker(special, NO_CONTINUATION, sampling, seed=0)(token_ids, lengths, 0)
    assert (masked.token_ids == token_ids).all()
    ends = np.cumsum(lengths) - 1
    assert not np.isin(masked.rows, ends).any()
    assert masked.rows.size == token_ids.size - lengths.size == mask_counts(lengths - 2, sampling).sum()
    assert (masked.labels == token_ids[masked.rows + 1]).all()
