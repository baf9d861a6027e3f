"""Samples are cut from the corpus as in the BERT paper: order, lengths, frequencies, and complete coverage."""

import re
from dataclasses import replace

import numpy as np
import pytest

from bertfast.data.samples import CHUNK_SENTENCES, CorpusBoundaries, Sampling, plan_samples


def plan(shards, seed=0, **settings):
    return plan_samples(CorpusBoundaries.of(shards), Sampling(**settings), np.random.default_rng(seed))


def document_of(shards, positions):
    boundaries = CorpusBoundaries.of(shards)
    return np.searchsorted(boundaries.sentence_starts[boundaries.document_starts], positions, side="right") - 1


def covered(shards, starts, lengths):
    """Return how many of the segments contain each token of the corpus."""
    edges = np.zeros(shards.tokens + 1, int)
    np.add.at(edges, starts, 1)
    np.add.at(edges, starts + lengths, -1)
    return np.cumsum(edges)[:-1]


def share_is(found, expected, count, slack=0.0):
    """Return whether a fraction of `count` draws is `expected`, within five standard deviations and `slack`."""
    return abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / count) + slack


def test_uncut_pairs_tile_every_document(prose):
    """Without truncation, the A and true B segments tile each document: displaced sentences start the next pair."""
    samples = plan(prose, max_seq_length=10**6, short_seq_probability=0)
    follows = ~samples.random_second
    starts = np.concatenate([samples.first_start, samples.second_start[follows]])
    lengths = np.concatenate([samples.first_length, samples.second_length[follows]])
    assert (covered(prose, starts, lengths) == 1).all()
    assert (samples.second_start == samples.first_start + samples.first_length)[follows].all()


@pytest.mark.parametrize("max_seq_length", [5, 64, 128])
def test_every_document_is_covered_and_no_segment_crosses_documents(prose, max_seq_length):
    samples = plan(prose, max_seq_length=max_seq_length)
    first, second = (document_of(prose, start) for start in (samples.first_start, samples.second_start))
    assert set(first) == set(range(prose.documents))
    assert (document_of(prose, samples.first_start + samples.first_length - 1) == first).all()
    assert (document_of(prose, samples.second_start + samples.second_length - 1) == second).all()
    assert ((first != second) == samples.random_second).all()
    lengths = samples.lengths(Sampling(max_seq_length=max_seq_length))
    assert lengths.max() == max_seq_length
    assert min(samples.first_length.min(), samples.second_length.min()) >= 1
    assert (lengths == samples.first_length + samples.second_length + 3).all()


def test_half_of_the_pairs_are_random(make_shards):
    shards = make_shards([[6] * 1000] * 200)
    random = plan(shards, short_seq_probability=0).random_second
    assert random.size > 10_000
    # The last sentence of a document may be left alone, without a next one: in at most one of 60 samples.
    assert share_is(random.mean(), 0.5, random.size, slack=1 / 60)


def test_random_b_is_uniform_over_documents_and_sentences(make_shards):
    shards = make_shards([[2] * 100] * 5, [[2] * 100] * 5)
    samples = plan(shards, max_seq_length=16)
    starts = samples.second_start[samples.random_second]
    share = np.bincount(document_of(shards, starts), minlength=10) / starts.size
    assert share_is(share, 0.1, starts.size).all()
    tenth = np.bincount(starts % 200 // 20, minlength=10) / starts.size
    assert share_is(tenth, 0.1, starts.size).all()


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm"])
def test_one_in_ten_samples_has_a_random_target_length(make_shards, objective):
    """Sentences of one token reach the target exactly, which makes its distribution visible."""
    shards = make_shards([[1] * 1000] * 300)
    sampling = Sampling(max_seq_length=64, objective=objective)
    samples = plan(shards, max_seq_length=64, objective=objective)
    text = samples.first_length + samples.second_length
    short = text[text < sampling.max_text_tokens]
    # Documents end early in up to one in 16 samples, and a random B at the end of its document.
    assert 0.09 < short.size / text.size < 0.1 + 2 / 16
    assert short.min() <= 3
    undisturbed = plan(shards, max_seq_length=64, objective=objective, short_seq_probability=0)
    tails = undisturbed.first_length + undisturbed.second_length < sampling.max_text_tokens
    assert share_is(short.size / text.size - tails.mean(), 0.1, text.size, slack=0.01)


def test_the_end_of_a_is_uniform_over_sentences(make_shards):
    shards = make_shards([[1] * 10] * 4000)
    samples = plan(shards, short_seq_probability=0)
    whole = samples.first_length[(samples.first_start % 10 == 0) & ~samples.random_second]
    share = np.bincount(whole, minlength=10)[1:] / whole.size
    assert share_is(share, 1 / 9, whole.size).all()


def test_random_b_fills_what_a_leaves_of_the_target(make_shards):
    """Sentences of one token are never truncated, so the length of A is uniform and B has the rest."""
    sampling = Sampling(max_seq_length=64, short_seq_probability=0)
    samples = plan(make_shards([[1] * 1000] * 1000), max_seq_length=64, short_seq_probability=0)
    full = samples.random_second & (samples.lengths(sampling) == 64)
    full &= samples.first_start % 1000 < 1000 - sampling.max_text_tokens  # near the end of a document A is constrained
    share = np.bincount(samples.first_length[full], minlength=sampling.max_text_tokens)[1:] / full.sum()
    assert share_is(share, 1 / (sampling.max_text_tokens - 1), full.sum()).all()


def test_truncation_removes_tokens_of_the_longer_segment_one_by_one(make_shards):
    """The kept lengths are those of the loop that removes a token of the longer segment (B in a tie) till they fit."""
    generator = np.random.default_rng(1)
    pairs = generator.integers(1, 27, (3000, 2))
    samples = plan(make_shards(pairs.tolist()), max_seq_length=30, short_seq_probability=0)
    boundaries = CorpusBoundaries.of(make_shards(pairs.tolist()))
    compared = 0
    for row in (~samples.random_second).nonzero()[0]:
        sentence = np.searchsorted(boundaries.sentence_starts, samples.first_start[row], side="right") - 1
        kept = list(pairs[sentence // 2])
        while sum(kept) > 27:
            kept[0 if kept[0] > kept[1] else 1] -= 1
        assert [samples.first_length[row], samples.second_length[row]] == kept
        compared += 1
    assert compared > 1000


def test_truncation_removes_tokens_at_either_end_with_equal_probability(make_shards):
    samples = plan(make_shards([[300, 300]] * 2000), short_seq_probability=0)
    for start, length in [samples[:2], samples[2:4]]:
        cut, cut_at_front = 300 - length[0], start % 300
        assert abs(cut_at_front.mean() - cut / 2) < 5 * np.sqrt(cut / 4 / start.size)
        assert abs(cut_at_front.std() / np.sqrt(cut / 4) - 1) < 0.1


def test_runs_of_whole_sentences_tile_the_corpus(prose):
    settings = {"max_seq_length": 256, "objective": "mlm"}
    samples = plan(prose, **settings)
    assert (covered(prose, samples.first_start, samples.first_length) == 1).all()
    assert not samples.second_length.any()
    assert not samples.random_second.any()
    edges = CorpusBoundaries.of(prose).sentence_starts
    assert np.isin(samples.first_start, edges).all()
    assert samples.lengths(Sampling(**settings)).max() <= 256
    ends = samples.first_start + samples.first_length - 1
    assert (document_of(prose, samples.first_start) == document_of(prose, ends)).all()


def test_a_sentence_that_is_too_long_continues_in_the_next_sample(make_shards):
    shards = make_shards([[1000, 3], [7]])
    samples = plan(shards, max_seq_length=128, objective="mlm")
    assert (covered(shards, samples.first_start, samples.first_length) == 1).all()
    assert samples.first_length.max() == 126


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm"])
def test_a_document_of_many_chunks_is_covered_to_its_end(make_shards, objective):
    sentences = 3 * CHUNK_SENTENCES + 5
    shards = make_shards([[2] * sentences, [2]])
    samples = plan(shards, max_seq_length=10**6, short_seq_probability=0, objective=objective)
    follows = ~samples.random_second
    starts = np.concatenate([samples.first_start, samples.second_start[follows]])
    lengths = np.concatenate([samples.first_length, samples.second_length[follows]])
    assert (covered(shards, starts, lengths) == 1).all()


def test_an_epoch_is_a_function_of_its_generator_and_randomly_ordered(prose):
    first, again, other = plan(prose, seed=1), plan(prose, seed=1), plan(prose, seed=2)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert first.first_start[:50].tolist() != other.first_start[:50].tolist()
    rising = np.diff(first.first_start) > 0
    assert share_is(rising.mean(), 0.5, rising.size)


@pytest.mark.parametrize("seed", range(5))
def test_a_random_second_segment_of_a_single_document_does_not_follow_the_first(make_shards, seed):
    samples = plan(make_shards([[3, 4] * 40]), seed=seed, max_seq_length=24)
    follows = samples.second_start == samples.first_start + samples.first_length
    whole = samples.first_length + samples.second_length < 21  # no token was cut between the two
    assert (follows == ~samples.random_second)[whole].all()
    assert 0 < samples.random_second.mean() < 1


def test_next_sentence_prediction_requires_two_sentences(make_shards):
    with pytest.raises(ValueError, match="requires at least two sentences and the shards hold one: use more text"):
        plan(make_shards([[3]]))
    assert plan(make_shards([[3, 4]])).first_length.sum() > 0
    assert plan(make_shards([[3]]), objective="mlm").first_length.sum() == 3


def test_shards_without_text_are_refused(make_shards):
    with pytest.raises(ValueError, match="hold no text"):
        plan(make_shards())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_seq_length": 4}, "--max-seq-length must be at least 5"),
        ({"objective": "nsp"}, "--objective must be auto, mlm+nsp, mlm or ltr"),
        ({"mlm_probability": 1.5}, "--mlm-probability must be from 0 to 1, got 1.5"),
        ({"short_seq_probability": -0.1}, "--short-seq-probability must be"),
        ({"mask_replace_prob": 0.8, "random_replace_prob": 0.3}, "must add up to at most 1"),
        (
            {"objective": "ltr", "whole_word": True, "mlm_probability": 0.3},
            "--mlm-probability and --whole-word would have no effect: --objective ltr masks no tokens",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(Sampling(), **settings)
