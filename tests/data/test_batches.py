"""Batches are pure functions of the seed, and an epoch holds every sample once, whole and correctly labelled."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from bertfast.data.batches import Batches
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.samples import CorpusBoundaries, Sampling
from bertfast.data.shards import Shards
from bertfast.data.tokenizer import continuation_tokens, load_tokenizer, special_tokens

TOKENS_PER_BIN, BINS_PER_STEP = 2048, 4


@pytest.fixture
def make_batches(prose, special):
    def make(shards=prose, seed=0, tokens_per_bin=TOKENS_PER_BIN, bins_per_step=BINS_PER_STEP, **settings):
        continuation = np.arange(shards.vocab_size) % 4 == 3
        return Batches(
            shards,
            special,
            continuation,
            Sampling(**settings),
            tokens_per_bin=tokens_per_bin,
            bins_per_step=bins_per_step,
            seed=seed,
        )

    return make


def same(batch, other):
    return batch.sequences.lengths == other.sequences.lengths and all(
        map(torch.equal, batch.tensors(), other.tensors())
    )


def original(batch):
    """Return the token ids before masking."""
    token_ids = batch.token_ids.clone()
    token_ids[batch.masked_rows[: batch.masked]] = batch.labels[: batch.masked]
    return token_ids


def segments(batch, special):
    """Return the corpus positions of the tokens of each segment, [A, B] or [A] per sample of a numbered corpus."""
    token_ids, cu_seqlens = original(batch).numpy(), batch.sequences.cu_seqlens.tolist()
    samples = []
    for start, end in pairwise(cu_seqlens):
        if end > start:
            assert token_ids[start] == special.cls
            separators = (token_ids[start:end] == special.sep).nonzero()[0] + start
            assert separators[-1] == end - 1
            edges = [start, *separators]
            samples.append([token_ids[a + 1 : b] - 5 for a, b in pairwise(edges)])
    return samples


@pytest.mark.parametrize("settings", [{}, {"objective": "mlm"}, {"whole_word": True}, {"max_seq_length": 512}])
def test_samples_are_whole_and_correctly_labelled(make_batches, prose, special, settings):
    boundaries = CorpusBoundaries.of(prose)
    document_starts = boundaries.sentence_starts[boundaries.document_starts]
    batches = make_batches(**settings)
    pairs, max_length = batches.pairs, settings.get("max_seq_length", 128)
    for batch in batches.first_epoch(limit=12):
        samples = segments(batch, special)
        num_tokens, count = batch.num_tokens, len(samples)
        assert max(batch.sequences.lengths) <= max_length
        assert batch.token_ids[num_tokens:].eq(special.pad).all()
        assert batch.sequences.lengths[count:].count(0) == len(batch.sequences.lengths) - count
        assert (batch.position_ids[:num_tokens] == batch.sequences.position[:num_tokens]).all()
        assert not batch.position_ids[num_tokens:].any()
        assert not batch.token_type_ids[num_tokens:].any()

        lengths = [len(segment) + (1 if kind else 2) for sample in samples for kind, segment in enumerate(sample)]
        kinds = [kind for sample in samples for kind in range(len(sample))]
        assert batch.token_type_ids[:num_tokens].tolist() == np.repeat(kinds, lengths).tolist()
        assert {len(sample) for sample in samples} == {2 if pairs else 1}
        assert all((np.diff(segment) == 1).all() and len(segment) for sample in samples for segment in sample)
        if not pairs:
            assert batch.next_sentence_labels is None
            continue
        labels = batch.next_sentence_labels
        assert labels[count:].eq(-100).all()
        for (first, second), label in zip(samples, labels[:count].tolist(), strict=True):
            documents = np.searchsorted(document_starts, [first[0], second[0]], side="right")
            assert label == (documents[0] != documents[1])
            # Truncation may leave a gap between A and the B that follows it.
            assert label == 1 or second[0] > first[-1]


def test_labels_do_not_leak(make_batches, special):
    """Four in five masked tokens become [MASK]; all other tokens have no label."""
    batches = list(make_batches().first_epoch())
    replaced = masked = 0
    for batch in batches:
        rows, rest = batch.masked_rows[: batch.masked], batch.masked_rows[batch.masked :]
        assert rows.unique().numel() == batch.masked
        assert batch.labels[: batch.masked].gt(special.mask).all()
        assert batch.labels[batch.masked :].eq(-100).all()
        assert batch.masked_rows.unique().numel() == len(batch.masked_rows), "unused entries name distinct other slots"
        assert (rest < len(batch.token_ids)).all()
        replaced += batch.token_ids[rows].eq(special.mask).sum().item()
        masked += batch.masked
        assert batch.token_ids.eq(special.mask).sum() == batch.token_ids[rows].eq(special.mask).sum()
    assert abs(replaced / masked - 0.8) < 5 * np.sqrt(0.16 / masked)
    assert 0.14 < masked / sum(batch.num_tokens for batch in batches) < 0.15


def test_masks_depend_on_sample_numbers(make_batches):
    batches = make_batches()
    for step in (0, batches.steps_per_epoch + 1):
        batch = batches.bin(step, 2)
        lengths = np.array([length for length in batch.sequences.lengths if length])
        token_ids = original(batch)[: batch.num_tokens].numpy()
        masked = batches.masker(token_ids, lengths, batch.sequences.sequence_ids[0].item())
        assert masked.rows.tolist() == batch.masked_rows[: batch.masked].tolist()
        assert masked.token_ids.tolist() == batch.token_ids[: batch.num_tokens].tolist()


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm"])
def test_an_epoch_holds_every_document_and_every_sample_exactly_once(make_batches, prose, special, objective):
    batches = make_batches(objective=objective)
    boundaries = CorpusBoundaries.of(prose)
    document_starts = boundaries.sentence_starts[boundaries.document_starts]
    firsts = [sample[0] for batch in batches.first_epoch() for sample in segments(batch, special)]
    starts = [first[0] for first in firsts]
    assert set(np.searchsorted(document_starts, starts, side="right") - 1) == set(range(prose.documents))
    assert starts == batches.epochs[0].samples.first_start.tolist()
    if objective == "mlm":
        assert sorted(np.concatenate(firsts).tolist()) == list(range(prose.tokens))


def test_a_bin_is_a_pure_function_of_seed_step_and_index(make_batches):
    batches = make_batches()
    steps = 2 * batches.steps_per_epoch + 1
    indices = [(step, index) for step in range(0, steps, 3) for index in range(BINS_PER_STEP)]
    in_order = {where: batches.bin(*where) for where in indices}
    assert all(same(batches.bin(*where), in_order[where]) for where in indices[::-1])
    assert same(make_batches().bin(*indices[-1]), in_order[indices[-1]])
    assert not same(make_batches(seed=1).bin(0, 0), in_order[0, 0])


def test_several_ranks_together_get_the_bins_of_one(make_batches):
    alone = make_batches()
    ranks = [make_batches() for _ in range(2)]
    for step in range(3):
        bins = {}
        for rank, batches in enumerate(ranks):
            for index in range(rank, BINS_PER_STEP, 2):
                bins[index] = batches.bin(step, index)
        assert sorted(bins) == list(range(BINS_PER_STEP))
        assert all(same(alone.bin(step, index), batch) for index, batch in bins.items())


def test_bins_continue_across_epochs(make_batches):
    """All bins of three epochs in order: consecutive sample numbers, and the same shapes everywhere."""
    batches = make_batches()
    expected_bins = sum(batches.epochs[number].bins for number in range(3))
    shapes, number = [tensor.shape for tensor in batches.bin(0, 0).tensors()], 0
    for bin_number in range(expected_bins):
        batch = batches.bin(*divmod(bin_number, BINS_PER_STEP))
        count = sum(length > 0 for length in batch.sequences.lengths)
        assert batch.sequences.sequence_ids[:count].tolist() == list(range(number, number + count))
        assert [tensor.shape for tensor in batch.tensors()] == shapes
        number += count
    assert number == batches.epochs[3].samples_before


def test_the_division_into_parts_does_not_matter(make_batches, make_shards):
    documents = np.random.default_rng(2).integers(1, 40, (60, 12)).tolist()
    whole, divided = make_shards(documents), make_shards(documents[:1], documents[1:31], documents[31:])
    for batch, other in zip(make_batches(whole).first_epoch(), make_batches(divided).first_epoch(), strict=True):
        assert same(batch, other)


def test_the_validation_set_is_fixed_and_limited(make_batches):
    batches = make_batches()
    all_bins = list(batches.first_epoch())
    assert len(all_bins) == batches.epochs[0].bins
    assert same(all_bins[5], batches.bin(1, 1))
    first = list(make_batches().first_epoch(limit=3))
    assert len(first) == 3
    assert all(map(same, first, all_bins))


def test_to_moves_all_tensors_of_a_batch(make_batches):
    moved = make_batches().bin(0, 0).to("meta")
    assert all(tensor.device.type == "meta" for tensor in moved.tensors())
    assert make_batches(objective="mlm").bin(0, 0).to("cpu").next_sentence_labels is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory requires a GPU")
def test_a_pinned_batch_is_the_same(make_batches):
    batch = make_batches().bin(0, 0)
    pinned = batch.pin_memory()
    assert all(tensor.is_pinned() for tensor in pinned.tensors())
    assert same(batch, pinned)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens_per_bin": 100}, "a bin of 100 tokens cannot hold a sample of 128"),
        ({"bins_per_step": 0}, "at least one bin"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_contradictory_settings_are_refused(make_batches, settings, message):
    with pytest.raises(ValueError, match=message):
        make_batches(**settings)


def test_shards_of_another_tokenizer_are_refused(prose, special):
    with pytest.raises(ValueError, match="run `bertfast prepare` again"):
        Batches(prose, special, np.zeros(7, bool), Sampling(), tokens_per_bin=512, bins_per_step=1, seed=0)


@pytest.mark.parametrize("where", [(-1, 0), (0, -1), (0, BINS_PER_STEP)])
def test_bins_that_do_not_exist_are_refused(make_batches, where):
    with pytest.raises(ValueError, match="steps count from 0"):
        make_batches().bin(*where)


@pytest.fixture(scope="module")
def encyclopedia(shared_data, tmp_path_factory):
    """Return a function that makes batches of real articles."""
    corpus = CorpusSettings(
        train_file=[str(shared_data / "corpus" / "wikipedia-valid.txt.xz")],
        tokenizer_name=str(shared_data / "vocab" / "bert-base-uncased-vocab.txt"),
        validation_split_percentage=0,
        processes=1,
    )
    folder = prepare(PrepareSettings(output_dir=str(tmp_path_factory.mktemp("encyclopedia")), corpus=corpus))
    tokenizer = load_tokenizer(folder)
    special, continuation = special_tokens(tokenizer), continuation_tokens(tokenizer)
    shards = Shards.open(folder / "train")

    def make(tokens_per_bin, **settings):
        sampling = Sampling(**settings)
        return Batches(shards, special, continuation, sampling, tokens_per_bin=tokens_per_bin, bins_per_step=1, seed=0)

    return make


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm"])
@pytest.mark.parametrize("tokens_per_bin", [4096, 16384])
def test_bins_of_real_text_are_98_percent_full(encyclopedia, tokens_per_bin, objective):
    batches = encyclopedia(tokens_per_bin, max_seq_length=512, objective=objective)
    num_tokens = [batch.num_tokens for batch in batches.first_epoch()]
    assert len(num_tokens) > 20
    assert np.mean(sorted(num_tokens)[1:]) / tokens_per_bin >= 0.98  # all but the last, partly filled bin


def test_half_of_the_pairs_of_real_text_are_random(encyclopedia):
    random = encyclopedia(4096).epochs[0].samples.random_second
    assert 0.48 < random.mean() < 0.56  # the last sentence of a document may have no next one
