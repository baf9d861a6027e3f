"""Sentences and pairs of sentences with a label each: from tables to packed batches of token ids.

A label is one of a list of names (classification) or a number (regression). S sequences, T packed tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bertfast.config import BertConfig
from bertfast.tasks.tables import Table

TEXT_COLUMNS = ("sentence", "sentence1", "text")
TEXT_PAIR_COLUMN = "sentence2"
LABEL_COLUMN = "label"

_TEXTS_AT_A_TIME = 10_000  # tokenized together: the tokenizer's objects are many times as large as the ids
_NAMES_SHOWN = 10


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what."""

    text: str
    text_pair: str | None
    label: str

    @classmethod
    def choose(cls, table: Table, text: str | None, text_pair: str | None, label: str | None) -> Columns:
        """The columns named; for those that are None the usual names, where the table has them."""
        if text is None:
            text = next((name for name in TEXT_COLUMNS if name in table.columns), None)
        if text is None:
            raise ValueError(
                f"{table.path} has none of the columns {', '.join(TEXT_COLUMNS)}, only "
                f"{', '.join(map(repr, table.columns))}: say with text_column which of them holds the text"
            )
        if text_pair is None and TEXT_PAIR_COLUMN in table.columns:
            text_pair = TEXT_PAIR_COLUMN
        return cls(text, text_pair, label or LABEL_COLUMN)


@dataclass(frozen=True, eq=False)
class Features:
    """Tokenized sequences, end to end.

    Attributes:
        token_ids: int32 [T], [CLS] and [SEP] included.
        token_type_ids: uint8 [T], 0 in the first text and 1 in the second.
        starts: int64 [S + 1], where each sequence starts in them, and the end.
        cut: how many sequences were cut to the greatest length.
        labels: int64 [S] numbers of labels, float32 [S] to regress; None where they are not known.
    """

    token_ids: np.ndarray
    token_type_ids: np.ndarray
    starts: np.ndarray
    cut: int
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def batch(self, rows: np.ndarray, device: torch.device | None = None) -> dict[str, Tensor]:
        """The sequences at `rows` (int [R]) as packed input of a model, with their labels [R] where there are some."""
        lengths = np.diff(self.starts)[rows]
        ends = np.cumsum(lengths)
        places = np.repeat(self.starts[rows] - (ends - lengths), lengths) + np.arange(ends[-1])
        arrays = {
            "input_ids": self.token_ids[places][None].astype(np.int64),
            "token_type_ids": self.token_type_ids[places][None].astype(np.int64),
            "cu_seq_lens_q": np.concatenate([[0], ends]).astype(np.int32),
        }
        if self.labels is not None:
            arrays["labels"] = self.labels[rows]
        return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str | tuple[str, str]], max_length: int, labels: np.ndarray | None = None
) -> Features:
    """Tokenize texts and pairs of texts; of a pair that is longer than `max_length` tokens, the longer text is cut."""
    ids, types, lengths, cut = [], [], [], 0
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    for start in range(0, len(texts), _TEXTS_AT_A_TIME):
        encodings = tokenizer.encode_batch_fast(texts[start : start + _TEXTS_AT_A_TIME])
        ids.append(np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32))
        types.append(np.fromiter(chain.from_iterable(encoding.type_ids for encoding in encodings), np.uint8))
        lengths += map(len, encodings)
        cut += sum(bool(encoding.overflowing) for encoding in encodings)
    tokenizer.no_truncation()  # it belongs to the caller
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Features(np.concatenate(ids), np.concatenate(types), starts, cut, labels)


def shuffled_batches(sequences: int, size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """All of range(sequences) in an order that `seed` and `epoch` decide, `size` at a time."""
    order = np.random.default_rng([seed, epoch]).permutation(sequences)
    return (order[start : start + size] for start in range(0, sequences, size))


def batches_by_length(features: Features, tokens: int) -> list[np.ndarray]:
    """All rows, the longest first, in batches of about `tokens` tokens: over it by less than a sequence."""
    lengths = np.diff(features.starts)
    order = np.argsort(-lengths, kind="stable")
    batch = (np.cumsum(lengths[order]) - lengths[order]) // tokens
    return np.split(order, np.flatnonzero(np.diff(batch)) + 1)


def is_regression(config: BertConfig) -> bool:
    """Whether a model's answers are numbers; ValueError for one that gives a text several labels."""
    if config.problem_type == "multi_label_classification":
        raise ValueError("this model gives a text several labels at a time, which is not supported here")
    return config.problem_type == "regression" or config.num_labels == 1


def label_numbers(config: BertConfig) -> dict[str, int] | None:
    """The number of each label by its name, or by itself where labels were never named; None in a regression."""
    if is_regression(config):
        return None
    unnamed = {str(i): i for i, name in config.id2label.items() if name == f"LABEL_{i}"}
    return unnamed | config.label2id


def raw_labels(table: Table, column: str) -> list[str]:
    """The labels as they are written; ValueError where one is missing."""
    labels = table.column(column)
    for row, label in enumerate(labels):
        if label is None or label == "":
            raise ValueError(f"{table.where(row)}: no label in column {column!r}")
    return [label if isinstance(label, str) else json.dumps(label) for label in labels]


def name_labels(labels: list[str]) -> list[str]:
    """The different labels in order: by value if all are whole numbers, else by the alphabet."""
    names = set(labels)
    if len(names) < 2:
        raise ValueError(f"every label is {labels[0]!r}; to classify, there must be two different ones")
    return sorted(names, key=int if all(name.removeprefix("-").isdecimal() for name in names) else None)


def are_fractions(labels: list[str]) -> bool:
    """Whether the labels are numbers, and not all whole ones."""
    try:
        return not all(float(label).is_integer() for label in labels)
    except ValueError:
        return False


def encode_labels(table: Table, column: str, numbers: dict[str, int] | None) -> np.ndarray:
    """The labels of a table as int64 [S] by `numbers`, or where that is None as float32 [S].

    ValueError, naming file and line, for one that is none of them, or no number.
    """
    labels = raw_labels(table, column)
    if numbers is None:
        values = [_number(table, row, label) for row, label in enumerate(labels)]
        return np.array(values, dtype=np.float32)
    for row, label in enumerate(labels):
        if label not in numbers:
            names = ", ".join([*numbers][:_NAMES_SHOWN]) + (", …" if len(numbers) > _NAMES_SHOWN else "")
            raise ValueError(f"{table.where(row)}: the label {label!r} is none of those known: {names}")
    return np.array([numbers[label] for label in labels], dtype=np.int64)


def featurize(
    table: Table,
    columns: Columns,
    tokenizer: Tokenizer,
    max_length: int,
    labels: np.ndarray | None = None,
) -> Features:
    """The features of a table's texts, or pairs, with `labels` (see `encode_labels`) if given."""
    texts = table.texts(columns.text)
    if columns.text_pair is not None:
        texts = list(zip(texts, table.texts(columns.text_pair), strict=True))
    return tokenize(tokenizer, texts, max_length, labels)


def _number(table: Table, row: int, label: str) -> float:
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{table.where(row)}: the label {label!r} is not a finite number, which a regression wants")
    return value
