"""Labels, features and batches of sentences."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from bertfast import BertConfig
from bertfast.data.tokenizer import special_tokens, train_tokenizer
from bertfast.tasks.classification import (
    Columns,
    are_fractions,
    batches_by_length,
    encode_labels,
    label_numbers,
    name_labels,
    shuffled_batches,
    tokenize,
)
from bertfast.tasks.tables import Table

TEXTS = ["a b c d e f", "b", "c d a", "", "f e d c b a"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a b c d e f"], 64)


def table(**columns: list) -> Table:
    return Table(Path("a.tsv"), columns, list(range(2, 2 + len(next(iter(columns.values()))))))


def test_columns_have_their_usual_names():
    pair = table(idx=["0"], sentence1=["x"], sentence2=["y"], label=["1"])
    assert Columns.choose(pair, None, None, None) == Columns("sentence1", "sentence2", "label")
    assert Columns.choose(pair, "idx", None, "sentence1") == Columns("idx", "sentence2", "sentence1")
    assert Columns.choose(table(text=["x"]), None, None, None) == Columns("text", None, "label")
    with pytest.raises(ValueError, match="only 'review', 'stars': say with text_column"):
        Columns.choose(table(review=["x"], stars=["1"]), None, None, None)


@pytest.mark.parametrize(
    ("labels", "names"),
    [(["b", "a", "b"], ["a", "b"]), (["10", "9", "-1"], ["-1", "9", "10"]), (["1", "x"], ["1", "x"])],
)
def test_label_names_are_in_order(labels, names):
    assert name_labels(labels) == names


def test_one_label_cannot_be_told_from_others():
    with pytest.raises(ValueError, match="every label is 'x'"):
        name_labels(["x", "x"])


@pytest.mark.parametrize(
    ("labels", "fractions"),
    [(["0.5", "1"], True), (["5.000", "4.750"], True), (["0", "1"], False), (["1.0", "2.0"], False), (["a"], False)],
)
def test_numbers_with_a_fraction_are_regressed(labels, fractions):
    assert are_fractions(labels) == fractions


def test_labels_are_numbered():
    rows = table(label=["no", "yes", "no"])
    assert encode_labels(rows, "label", {"no": 0, "yes": 1}).tolist() == [0, 1, 0]
    assert encode_labels(table(label=[1, 0, True]), "label", {"0": 0, "1": 1, "true": 2}).tolist() == [1, 0, 2]
    values = encode_labels(table(label=["0.5", 2]), "label", None)
    assert values.tolist() == [0.5, 2.0]
    assert values.dtype == np.float32


@pytest.mark.parametrize(
    ("labels", "numbers", "message"),
    [
        (["0", "2"], {"0": 0, "1": 1}, "a.tsv, line 3: the label '2' is none of those known: 0, 1$"),
        (["0", "x"], {str(i): i for i in range(11)}, "known: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …$"),
        (["0", ""], {"0": 0}, "a.tsv, line 3: no label in column 'label'"),
        (["0", None], None, "a.tsv, line 3: no label in column 'label'"),
        (["0", "x"], None, "a.tsv, line 3: the label 'x' is not a finite number"),
        (["nan", "1"], None, "a.tsv, line 2: the label 'nan' is not a finite number"),
    ],
)
def test_labels_outside_the_range_are_named(labels, numbers, message):
    with pytest.raises(ValueError, match=message):
        encode_labels(table(label=labels), "label", numbers)


def test_labels_of_a_model():
    assert label_numbers(BertConfig(id2label={0: "no", 1: "yes"})) == {"no": 0, "yes": 1}
    assert label_numbers(BertConfig(num_labels=2)) == {"0": 0, "1": 1, "LABEL_0": 0, "LABEL_1": 1}
    assert label_numbers(BertConfig(num_labels=1)) is None
    assert label_numbers(BertConfig(problem_type="regression")) is None
    with pytest.raises(ValueError, match="several labels"):
        label_numbers(BertConfig(problem_type="multi_label_classification"))


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
    features = tokenize(tokenizer, [(text, "f") for text in TEXTS], 64, labels=np.arange(5))
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
    transformers = pytest.importorskip("transformers")
    from bertfast.data.tokenizer import load_tokenizer
    from bertfast.tasks.tables import read_table

    vocabulary = shared_data / "vocab" / "bert-base-uncased-vocab.txt"
    texts = read_table(shared_data / "glue" / "SST-2" / "dev.tsv.gz").texts("sentence")[:200]
    features = tokenize(load_tokenizer(vocabulary), texts, 32)
    theirs = transformers.BertTokenizer(vocab=str(vocabulary))(texts, truncation=True, max_length=32)["input_ids"]
    assert [features.token_ids[slice(*features.starts[i : i + 2])].tolist() for i in range(200)] == theirs
