"""Masks: how many tokens, which ones, what the model sees in their place, and nothing of the rest."""

import numpy as np
import pytest

from bertfast.data.masking import Masker, mask_counts
from bertfast.data.samples import Sampling

VOCABULARY = 40
ORDINARY = np.arange(5, VOCABULARY)
NO_CONTINUATION = np.zeros(VOCABULARY, bool)
CONTINUATION = np.arange(VOCABULARY) >= 25


def packed(special, text_lengths, seed=0):
    """(token ids, lengths) of random [CLS] A [SEP] B [SEP] samples with texts of these lengths."""
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
    assert (token_ids == original).all(), "the caller's tokens are left alone"
    assert (masked.labels == original[masked.rows]).all()
    assert (np.diff(masked.rows) > 0).all()
    elsewhere = np.delete(np.arange(original.size), masked.rows)
    assert (masked.token_ids[elsewhere] == original[elsewhere]).all()
    assert not np.isin(masked.labels, [special.cls, special.sep]).any()


@pytest.mark.parametrize("probability", [0.15, 0.4, 0.01, 1.0])
def test_each_sample_has_exactly_its_share_masked(special, probability):
    token_ids, lengths = many(special)
    masked = Masker(special, NO_CONTINUATION, Sampling(mlm_probability=probability), seed=0)(token_ids, lengths, 0)
    sample = np.repeat(np.arange(lengths.size), lengths)
    expected = [max(1, round(probability * (length - 3))) for length in lengths.tolist()]
    assert np.bincount(sample[masked.rows], minlength=lengths.size).tolist() == expected


def test_at_most_all_there_is_to_mask_is_masked():
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
def test_masked_tokens_are_hidden_exchanged_or_kept(special, mask, random):
    token_ids, lengths = many(special)
    sampling = Sampling(mask_replace_prob=mask, random_replace_prob=random)
    masked = Masker(special, NO_CONTINUATION, sampling, seed=0)(token_ids, lengths, 0)
    seen, count = masked.token_ids[masked.rows], masked.rows.size
    by_chance = random / ORDINARY.size  # a random token may be the same one
    for found, expected in [
        ((seen == special.mask).mean(), mask),
        (((seen != special.mask) & (seen != masked.labels)).mean(), random - by_chance),
        ((seen == masked.labels).mean(), 1 - mask - random + by_chance),
    ]:
        assert abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 1e-12


def test_random_tokens_are_any_but_special_ones(special):
    token_ids, lengths = many(special)
    sampling = Sampling(mask_replace_prob=0, random_replace_prob=1)
    masked = Masker(special, NO_CONTINUATION, sampling, seed=0)(token_ids, lengths, 0)
    drawn = np.bincount(masked.token_ids[masked.rows], minlength=VOCABULARY)
    assert not drawn[:5].any()
    share, expected = drawn[5:] / drawn.sum(), 1 / ORDINARY.size
    assert np.abs(share - expected).max() < 5 * np.sqrt(expected / drawn.sum())


@pytest.mark.parametrize("whole_word", [False, True])
def test_masks_follow_from_seed_and_sample_number_alone(special, whole_word):
    """Whatever the neighbours, a sample with this number is masked like this; another number or seed does otherwise."""
    token_ids, lengths = packed(special, [60, 7, 60, 100])
    sampling = Sampling(whole_word=whole_word)
    masker = Masker(special, CONTINUATION, sampling, seed=5)
    together = masker(token_ids, lengths, 40)
    starts = np.cumsum(lengths) - lengths
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own = token_ids[start : start + length]
        alone = masker(own, lengths[index : index + 1], 40 + index)
        assert (alone.token_ids == together.token_ids[start : start + length]).all()
        inside = (together.rows >= start) & (together.rows < start + length)
        assert (alone.rows == together.rows[inside] - start).all()
    last = masker(own, lengths[3:], 43)
    assert last.rows.tolist() != masker(own, lengths[3:], 44).rows.tolist()
    assert last.rows.tolist() != Masker(special, CONTINUATION, sampling, seed=6)(own, lengths[3:], 43).rows.tolist()


def test_whole_words_are_masked_whole(special):
    token_ids, lengths = many(special)
    masked = Masker(special, CONTINUATION, Sampling(whole_word=True), seed=0)(token_ids, lengths, 0)
    hidden = np.zeros(token_ids.size, bool)
    hidden[masked.rows] = True
    bounds = np.isin(token_ids, [special.cls, special.sep])
    word_starts = ~CONTINUATION[token_ids] | bounds | np.roll(bounds, 1)
    word = np.cumsum(word_starts) - 1
    size, hidden_size = np.bincount(word), np.bincount(word, hidden)

    sample = np.repeat(np.arange(lengths.size), lengths)
    counts, wanted = np.bincount(sample, hidden), mask_counts(lengths - 3, Sampling())
    assert (counts <= wanted).all()
    assert (counts >= 1).all()
    assert counts.sum() > 0.93 * wanted.sum()
    # A word is masked in part only alone, and only where every word of its sample is longer than what was wanted.
    shortest = np.full(lengths.size, lengths.max())
    np.minimum.at(shortest, sample[~bounds], size[word[~bounds]])
    cut = (hidden_size > 0) & (hidden_size < size)
    of_cut = sample[word_starts][cut]
    assert (counts[of_cut] == hidden_size[cut]).all()
    assert (shortest[of_cut] > wanted[of_cut]).all()


def test_all_of_a_text_is_its_words(special):
    """A text may begin amid a word, where its sentence was cut; that piece is a word then."""
    token_ids, lengths = many(special)
    masker = Masker(special, CONTINUATION, Sampling(whole_word=True, mlm_probability=1), seed=0)
    assert masker(token_ids, lengths, 0).rows.size == (lengths - 3).sum()


def test_nothing_to_mask_is_no_error(special):
    token_ids, lengths = np.array([special.cls, special.sep, special.sep]), np.array([3])
    masked = Masker(special, NO_CONTINUATION, Sampling(), seed=0)(token_ids, lengths, 0)
    assert masked.rows.size == 0
    assert (masked.token_ids == token_ids).all()


def test_from_left_to_right_every_token_but_the_last_is_asked_about_the_next(special):
    token_ids, lengths = many(special)
    sampling = Sampling(objective="ltr")
    masked = Masker(special, NO_CONTINUATION, sampling, seed=0)(token_ids, lengths, 0)
    assert (masked.token_ids == token_ids).all()
    ends = np.cumsum(lengths) - 1
    assert not np.isin(masked.rows, ends).any()
    assert masked.rows.size == token_ids.size - lengths.size == mask_counts(lengths - 2, sampling).sum()
    assert (masked.labels == token_ids[masked.rows + 1]).all()
