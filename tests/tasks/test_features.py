"""Examples as token ids, and the batches made of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from bertfast.data.tokenizer import special_tokens, train_tokenizer
from bertfast.ops.sequences import bucket
from bertfast.tasks.features import batches_by_length, labels_in, shuffled_batches, tokenize, within_budget

TEXTS = ["a b c d e f", "b", "c d a", "", "f e d c b a"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a b c d e f"], 64)


def test_features_are_the_tokenizers_own(tokenizer):
    special = special_tokens(tokenizer)
    pairs = [(text, "b a") for text in TEXTS]
    for texts in (TEXTS, pairs):
        features = tokenize(tokenizer, texts, 64)
        assert features.cut == 0
        for row, text in enumerate(texts):
            ids = features.token_ids[slice(*features.starts[row : row + 2])]
            types = features.token_type_ids[slice(*features.starts[row : row + 2])]
            first, second = (text, None) if isinstance(text, str) else text
            words = tokenizer.encode(first, add_special_tokens=False).ids
            expected = [special.cls, *words, special.sep]
            expected_types = [0] * len(expected)
            if second is not None:
                expected += [*tokenizer.encode(second, add_special_tokens=False).ids, special.sep]
                expected_types += [1] * (len(expected) - len(expected_types))
            assert ids.tolist() == expected
            assert types.tolist() == expected_types


def test_what_is_too_long_is_cut_and_counted(tokenizer):
    features = tokenize(tokenizer, [*TEXTS, ("a b c d e f", "a")], 5)
    assert np.diff(features.starts).tolist() == [5, 3, 5, 2, 5, 5]
    assert features.cut == 3
    # The longer text of a pair gives way: one of [CLS] a [SEP] a [SEP] is the second text.
    assert features.token_type_ids[-5:].tolist() == [0, 0, 0, 1, 1]
    assert tokenizer.truncation is None


def test_a_batch_is_its_sequences_end_to_end(tokenizer):
    features = replace(tokenize(tokenizer, [(text, "f") for text in TEXTS], 64), labels={"labels": np.arange(5)})
    rows = np.array([3, 0, 4])
    batch = features.batch(rows)
    parts = [slice(*features.starts[row : row + 2]) for row in rows]
    assert batch["input_ids"].tolist() == [np.concatenate([features.token_ids[part] for part in parts]).tolist()]
    types = np.concatenate([features.token_type_ids[part] for part in parts])
    assert batch["token_type_ids"].tolist() == [types.tolist()]
    assert batch["cu_seq_lens_q"].tolist() == np.cumsum([0, *(part.stop - part.start for part in parts)]).tolist()
    assert batch["labels"].tolist() == rows.tolist()
    dtypes = [batch[name].dtype for name in ("input_ids", "token_type_ids", "cu_seq_lens_q", "labels")]
    assert dtypes == [torch.int64, torch.int64, torch.int32, torch.int64]


def test_an_epoch_shuffles_all_rows_its_own_way():
    epochs = [list(shuffled_batches(10, 4, seed=7, epoch=epoch)) for epoch in (0, 0, 1)]
    assert [len(batch) for batch in epochs[0]] == [4, 4, 2]
    orders = [np.concatenate(epoch).tolist() for epoch in epochs]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != np.concatenate(list(shuffled_batches(10, 4, seed=8, epoch=0))).tolist()


@pytest.mark.parametrize("budget", [1, 7, 16, 1000])
def test_batches_by_length_hold_every_row_within_the_budget(tokenizer, budget):
    features = tokenize(tokenizer, TEXTS * 3, 64)
    lengths = np.diff(features.starts)
    batches = batches_by_length(features, budget)
    rows = np.concatenate(batches)
    assert sorted(rows) == list(range(15))
    assert (np.diff(lengths[rows]) <= 0).all()
    assert all(lengths[batch].sum() < budget + lengths.max() for batch in batches)
    assert len(batches) <= -(-lengths.sum() // budget)


def test_sst2_tokenizes_like_the_reference(shared_data):
    from bertfast.data.tokenizer import load_tokenizer
    from bertfast.tasks.tables import read_table

    vocabulary = shared_data / "vocab" / "bert-base-uncased-vocab.txt"
    texts = read_table(shared_data / "glue" / "SST-2" / "dev.tsv.gz").texts("sentence")[:200]
    features = tokenize(load_tokenizer(vocabulary), texts, 32)
    theirs = transformers.BertTokenizer(str(vocabulary))(texts, truncation=True, max_length=32)["input_ids"]
    assert [features.token_ids[slice(*features.starts[i : i + 2])].tolist() for i in range(200)] == theirs


def test_choices_lie_together_and_tokens_labels_with_them(tokenizer):
    features = replace(tokenize(tokenizer, TEXTS[:4], 64), choices=2, labels={"labels": np.array([1, 0])})
    assert len(features) == 2
    batch = features.batch(np.array([1, 0]))
    flipped = tokenize(tokenizer, [TEXTS[2], TEXTS[3], TEXTS[0], TEXTS[1]], 64)
    assert batch["input_ids"][0].tolist() == flipped.token_ids.tolist()
    assert batch["cu_seq_lens_q"].tolist() == flipped.starts.tolist()
    assert (batch["labels"].tolist(), batch["num_choices"]) == ([0, 1], 2)
    assert features.lengths[::-1].tolist() == np.diff(flipped.starts[::2]).tolist()
    tagged = replace(features, choices=1, labels={"labels": np.arange(len(features.token_ids))})
    batch = tagged.batch(np.array([2, 0]))
    assert (tagged.token_ids[batch["labels"][0]] == batch["input_ids"][0].numpy()).all()


def test_a_budget_cuts_rows_where_they_are(tokenizer):
    features = tokenize(tokenizer, TEXTS, 64)  # 8, 3, 5, 2 and 8 tokens
    rows = np.array([4, 1, 2, 3, 0])
    assert [part.tolist() for part in within_budget(features, rows, 10)] == [[4, 1], [2, 3, 0]]
    assert [part.tolist() for part in within_budget(features, rows, 1)] == [[4], [1], [2], [3], [0]]


def test_bucketed_inputs_are_the_batch_and_padding_slots(tokenizer):
    features = tokenize(tokenizer, TEXTS * 4, 64)
    labels = {"labels": np.arange(len(features.token_ids)), "weights": np.ones(len(features.token_ids), np.float32)}
    features = replace(features, labels=labels)
    rows = np.arange(17)
    plain, padded = (features.model_inputs(rows, bucketed=bucketed).arguments for bucketed in (False, True))
    tokens = plain["input_ids"].shape[1]
    assert padded["input_ids"].shape == padded["labels"].shape == (1, bucket(tokens)) != (1, tokens)
    for name, value in plain.items():
        assert torch.equal(padded[name][..., : value.shape[-1]], value)
    rest = {name: set(padded[name][0, tokens:].tolist()) for name in ("input_ids", "labels", "weights")}
    assert rest == {"input_ids": {0}, "labels": {-100}, "weights": {0.0}}
    assert torch.equal(padded["cu_seq_lens_q"], plain["cu_seq_lens_q"])
    assert padded["max_length_q"] == features.lengths.max()
    assert labels_in(padded) == labels_in(plain)


@pytest.mark.parametrize("choices", [1, 2])
def test_without_labels_examples_are_few_numbers_too(tokenizer, choices):
    features = replace(tokenize(tokenizer, TEXTS * 4, 64), choices=choices, labels={"labels": np.zeros(20 // choices)})
    for count, slots in ((1, 1), (3, 4), (8, 8), (9, 16)):
        arguments = features.model_inputs(np.arange(count), labels=False, bucketed=True).arguments
        assert "labels" not in arguments
        lengths = arguments["cu_seq_lens_q"].diff().tolist()
        assert len(lengths) == slots * choices
        assert not any(lengths[count * choices :])
