"""Tokenized examples, and packed batches of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from bertfast.data.tokenizer import special_tokens, train_tokenizer
from bertfast.ops.sequences import bucket
from bertfast.tasks.features import (
    BUCKETED,
    Buckets,
    batches_by_length,
    count_labels,
    shuffled_batches,
    tokenize,
    within_budget,
)

TEXTS = ["a b c d e f", "b", "c d a", "", "f e d c b a"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a b c d e f"], 64)


def test_features_are_the_tokenizers_encodings(tokenizer):
    special = special_tokens(tokenizer)
    pairs = [(text, "b a") for text in TEXTS]
    for texts in (TEXTS, pairs):
        features = tokenize(tokenizer, texts, 64)
        assert features.num_truncated == 0
        for row, text in enumerate(texts):
            ids = features.token_ids[slice(*features.cu_seqlens[row : row + 2])]
            types = features.token_type_ids[slice(*features.cu_seqlens[row : row + 2])]
            first, second = (text, None) if isinstance(text, str) else text
            words = tokenizer.encode(first, add_special_tokens=False).ids
            expected = [special.cls, *words, special.sep]
            expected_types = [0] * len(expected)
            if second is not None:
                expected += [*tokenizer.encode(second, add_special_tokens=False).ids, special.sep]
                expected_types += [1] * (len(expected) - len(expected_types))
            assert ids.tolist() == expected
            assert types.tolist() == expected_types


def test_long_texts_are_truncated_and_counted(tokenizer):
    features = tokenize(tokenizer, [*TEXTS, ("a b c d e f", "a")], 5)
    assert np.diff(features.cu_seqlens).tolist() == [5, 3, 5, 2, 5, 5]
    assert features.num_truncated == 3
    # The longer text of a pair is truncated first: one of [CLS] a [SEP] a [SEP] is the second text.
    assert features.token_type_ids[-5:].tolist() == [0, 0, 0, 1, 1]
    assert tokenizer.truncation is None


def test_batch_is_the_concatenated_sequences(tokenizer):
    features = replace(tokenize(tokenizer, [(text, "f") for text in TEXTS], 64), labels={"labels": np.arange(5)})
    rows = np.array([3, 0, 4])
    batch = features.batch(rows)
    parts = [slice(*features.cu_seqlens[row : row + 2]) for row in rows]
    assert batch["input_ids"].tolist() == [np.concatenate([features.token_ids[part] for part in parts]).tolist()]
    types = np.concatenate([features.token_type_ids[part] for part in parts])
    assert batch["token_type_ids"].tolist() == [types.tolist()]
    assert batch["cu_seq_lens_q"].tolist() == np.cumsum([0, *(part.stop - part.start for part in parts)]).tolist()
    assert batch["labels"].tolist() == rows.tolist()
    dtypes = [batch[name].dtype for name in ("input_ids", "token_type_ids", "cu_seq_lens_q", "labels")]
    assert dtypes == [torch.int64, torch.int64, torch.int32, torch.int64]


def test_each_epoch_has_its_own_permutation_of_all_rows():
    epochs = [list(shuffled_batches(10, 4, seed=7, epoch=epoch)) for epoch in (0, 0, 1)]
    assert [len(batch) for batch in epochs[0]] == [4, 4, 2]
    orders = [np.concatenate(epoch).tolist() for epoch in epochs]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != np.concatenate(list(shuffled_batches(10, 4, seed=8, epoch=0))).tolist()


@pytest.mark.parametrize("budget", [1, 7, 16, 1000])
def test_batches_by_length_contain_every_row_within_the_token_budget(tokenizer, budget):
    features = tokenize(tokenizer, TEXTS * 3, 64)
    lengths = np.diff(features.cu_seqlens)
    batches = batches_by_length(features, budget)
    rows = np.concatenate(batches)
    assert sorted(rows) == list(range(15))
    assert (np.diff(lengths[rows]) <= 0).all()
    assert all(lengths[batch].sum() < budget + lengths.max() for batch in batches)
    assert len(batches) <= -(-lengths.sum() // budget)


def test_sst2_is_tokenized_as_by_transformers(shared_data):
    from bertfast.data.tokenizer import load_tokenizer
    from bertfast.tasks.tables import read_table

    vocabulary = shared_data / "vocab" / "bert-base-uncased-vocab.txt"
    texts = read_table(shared_data / "glue" / "SST-2" / "dev.tsv.gz").texts("sentence")[:200]
    features = tokenize(load_tokenizer(vocabulary), texts, 32)
    expected = transformers.BertTokenizer(str(vocabulary))(texts, truncation=True, max_length=32)["input_ids"]
    assert [features.token_ids[slice(*features.cu_seqlens[i : i + 2])].tolist() for i in range(200)] == expected


def test_choices_of_an_example_are_adjacent_and_token_labels_follow_their_tokens(tokenizer):
    features = replace(tokenize(tokenizer, TEXTS[:4], 64), num_choices=2, labels={"labels": np.array([1, 0])})
    assert len(features) == 2
    batch = features.batch(np.array([1, 0]))
    reordered = tokenize(tokenizer, [TEXTS[2], TEXTS[3], TEXTS[0], TEXTS[1]], 64)
    assert batch["input_ids"][0].tolist() == reordered.token_ids.tolist()
    assert batch["cu_seq_lens_q"].tolist() == reordered.cu_seqlens.tolist()
    assert batch["labels"].tolist() == [0, 1]
    assert features.model_inputs(np.array([1, 0])).num_choices == 2
    assert features.lengths[::-1].tolist() == np.diff(reordered.cu_seqlens[::2]).tolist()
    tagged = replace(features, num_choices=1, labels={"labels": np.arange(len(features.token_ids))})
    batch = tagged.batch(np.array([2, 0]))
    assert (tagged.token_ids[batch["labels"][0]] == batch["input_ids"][0].numpy()).all()


def test_within_budget_keeps_the_order_of_rows(tokenizer):
    features = tokenize(tokenizer, TEXTS, 64)  # 8, 3, 5, 2 and 8 tokens
    rows = np.array([4, 1, 2, 3, 0])
    assert [batch.tolist() for batch in within_budget(features, rows, 10)] == [[4, 1], [2, 3, 0]]
    assert [batch.tolist() for batch in within_budget(features, rows, 1)] == [[4], [1], [2], [3], [0]]


def test_bucketed_inputs_are_the_batch_followed_by_padding_slots(tokenizer):
    features = tokenize(tokenizer, TEXTS * 4, 64)
    labels = {"labels": np.arange(len(features.token_ids)), "weights": np.ones(len(features.token_ids), np.float32)}
    features = replace(features, labels=labels)
    rows = np.arange(17)
    inputs = features.model_inputs(rows, buckets=BUCKETED)
    plain, padded = features.model_inputs(rows).arguments, inputs.arguments
    tokens = plain["input_ids"].shape[1]
    assert padded["input_ids"].shape == padded["labels"].shape == (1, bucket(tokens)) != (1, tokens)
    for name, value in plain.items():
        assert torch.equal(padded[name][..., : value.shape[-1]], value)
    rest = {name: set(padded[name][0, tokens:].tolist()) for name in ("input_ids", "labels", "weights")}
    assert rest == {"input_ids": {0}, "labels": {-100}, "weights": {0.0}}
    assert torch.equal(padded["cu_seq_lens_q"], plain["cu_seq_lens_q"])
    assert inputs.max_seqlen_bound == features.lengths.max()
    assert count_labels(padded) == count_labels(plain)


@pytest.mark.parametrize("num_choices", [1, 2])
def test_without_labels_the_number_of_examples_is_bucketed(tokenizer, num_choices):
    features = replace(
        tokenize(tokenizer, TEXTS * 4, 64), num_choices=num_choices, labels={"labels": np.zeros(20 // num_choices)}
    )
    for count, slots in ((1, 1), (3, 4), (8, 8), (9, 16)):
        arguments = features.model_inputs(np.arange(count), labels=False, buckets=BUCKETED).arguments
        assert "labels" not in arguments
        lengths = arguments["cu_seq_lens_q"].diff().tolist()
        assert len(lengths) == slots * num_choices
        assert not any(lengths[count * num_choices :])
        only_examples = features.model_inputs(
            np.arange(count), labels=False, buckets=Buckets(tokens=False, examples=True)
        )
        assert torch.equal(only_examples.arguments["cu_seq_lens_q"], arguments["cu_seq_lens_q"])
        assert only_examples.arguments["input_ids"].shape[1] == sum(lengths)
        assert only_examples.max_seqlen_bound is None


def test_no_texts_have_no_batches(tokenizer):
    features = tokenize(tokenizer, [], 16)
    assert (len(features), features.max_seqlen, batches_by_length(features, 64)) == (0, 0, [])
    assert features.batch(np.empty(0, np.int64))["input_ids"].shape == (1, 0)


@pytest.mark.parametrize("text", ["a \ud800", ("a", "\ud800 b")], ids=["text", "pair"])
def test_texts_that_are_not_unicode_are_named(text, tokenizer):
    with pytest.raises(
        ValueError, match=r"^text 7: unpaired surrogate \\ud800, which is not a character: replace it by"
    ):
        tokenize(tokenizer, [*["a"] * 6, text], 8)
