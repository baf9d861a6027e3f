"""Sentences and pairs of sentences: one label each, several, or a number.

E examples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

from bertfast.encoder import sequence_classification_loss, sequence_logits
from bertfast.models.bert import BertForSequenceClassification
from bertfast.tasks.features import Features, ModelInputs, tokenize
from bertfast.tasks.glue import BENCHMARKS, Benchmark
from bertfast.tasks.metrics import (
    CLASSIFICATION,
    MULTI_LABEL,
    REGRESSION,
    confusion,
    measure_classes,
    measure_numbers,
    measure_sets,
)
from bertfast.tasks.tables import BadRows, Table, read_table
from bertfast.tasks.task import Confusion, Outputs, Task, TaskSettings, write_rows

TEXT_COLUMNS = ("sentence", "sentence1", "text")
TEXT_PAIR_COLUMN = "sentence2"
LABEL_COLUMN = "label"
SEPARATOR = ","  # of the labels of a text that has several, where they are one field

CLASSES, NUMBERS, SETS = "single_label_classification", "regression", "multi_label_classification"
PROBLEMS = {"classification": CLASSES, "regression": NUMBERS, "multi-label": SETS}
METRICS = {CLASSES: CLASSIFICATION, NUMBERS: REGRESSION, SETS: MULTI_LABEL}
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
class Sentences:
    """Texts, or pairs of texts, and where they are known their labels as they are written.

    Attributes:
        where: says of each example the file and line.
        indices: the index that a benchmark's file gives each, else its number from 0.
    """

    texts: list[str] | list[tuple[str, str]]
    labels: list[str] | list[list[str]] | None
    where: list[str]
    indices: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def kept(self, rows: Sequence[int]) -> Sentences:
        """Some of them."""
        labels = None if self.labels is None else [self.labels[row] for row in rows]
        rest = ([values[row] for row in rows] for values in (self.where, self.indices))
        return Sentences([self.texts[row] for row in rows], labels, *rest)


class SentenceTask(Task):
    """A label, several, or a number for each text or pair."""

    model = BertForSequenceClassification
    head = "classifier."

    def __init__(self, settings: TaskSettings):
        super().__init__(settings)
        given = (settings.text_column, settings.text_pair_column, settings.label_column)
        self.benchmark: Benchmark | None = BENCHMARKS.get(settings.task)
        if self.benchmark is not None:
            usual = (self.benchmark.text, self.benchmark.pair, self.benchmark.label)
            given = tuple(own or name for own, name in zip(given, usual, strict=True))
        self.columns = given
        self.problem = PROBLEMS.get(settings.task)
        if self.benchmark is not None:
            self.problem = NUMBERS if self.benchmark.regression else CLASSES

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of the benchmark, or of the kind of problem."""
        known = METRICS[self.problem]
        if self.benchmark is None:
            return known
        return (*self.benchmark.metrics, *(name for name in known if name not in self.benchmark.metrics))

    def read(self, path: str, *, labelled: bool) -> Sentences:
        """Of a .tsv, .csv or .jsonl file."""
        header = self.benchmark.header if self.benchmark is not None and labelled else None
        table = read_table(path, header=header, bad=self.bad)
        columns = Columns.choose(table, *self.columns)
        if labelled and self.benchmark is not None and self.benchmark.unlabelled is not None:
            label = table.column(columns.label)
            table = table.rows(row for row in range(len(table)) if label[row] != self.benchmark.unlabelled)
        texts = table.texts(columns.text)
        if columns.text_pair is not None:
            texts = list(zip(texts, table.texts(columns.text_pair), strict=True))
        where = [table.where(row) for row in range(len(table))]
        known = labelled or columns.label in table.columns
        labels = self._labels(table.column(columns.label), columns.label, where) if known else None
        indices = table.columns.get("index", [str(row) for row in range(len(table))])
        sentences = Sentences(texts, labels, where, indices)
        if labels is None:
            return sentences
        return sentences.kept([row for row, label in enumerate(labels) if label is not None])

    def learn_labels(self, examples: Sentences) -> dict[str, Any]:
        """How many there are, and their names."""
        labels = examples.labels
        if self.problem is None:
            self.problem = NUMBERS if are_fractions(labels) else CLASSES
        if self.problem == NUMBERS:
            names = ["LABEL_0"]
        else:
            names = name_labels([name for label in labels for name in label] if self.problem == SETS else labels)
        return {"num_labels": len(names), "id2label": dict(enumerate(names)), "problem_type": self.problem}

    def know(self, config: BertConfig) -> None:
        """Labels and their numbers."""
        super().know(config)
        known = config.problem_type or (NUMBERS if config.num_labels == 1 else CLASSES)
        if self.problem not in (None, known):
            raise ValueError(f"the model was trained for {known.replace('_', ' ')}, not for {self.settings.task}")
        self.problem = known

    def featurize(self, examples: Sentences, tokenizer: Tokenizer, max_length: int) -> tuple[Sentences, Features]:
        """One sequence each."""
        labels = {}
        if examples.labels is not None:
            encoded, good = self._encode(examples)
            examples, labels = examples.kept(good), {"labels": encoded}
        return examples, replace(tokenize(tokenizer, examples.texts, max_length), labels=labels)

    def logits(self, model: PreTrainedModel, inputs: ModelInputs) -> Tensor:
        """[E, labels]."""
        return sequence_logits(model, inputs.packed(model))

    def loss(self, model: PreTrainedModel, inputs: ModelInputs, items: Tensor) -> Tensor:
        """That of the kind of problem."""
        return sequence_classification_loss(model, inputs.packed(model), inputs.arguments["labels"], items)

    def answers(self, examples: Sentences, features: Features, outputs: Outputs) -> Iterator[dict]:
        """{"label", "score"}, its probability; {"score"} of a regression; {"labels"} with a probability each."""
        names = self.config.id2label
        for logits in outputs:
            if self.problem == NUMBERS:
                yield {"score": float(logits[0])}
            elif self.problem == SETS:
                scores = 1 / (1 + np.exp(-logits))
                yield {"labels": {names[i]: float(scores[i]) for i in np.flatnonzero(scores > 0.5)}}
            else:
                scores = softmax(logits)
                yield {"label": names[int(scores.argmax())], "score": float(scores.max())}

    def measure(self, examples: Sentences, features: Features, outputs: Outputs) -> dict[str, float]:
        """Those of the benchmark, or of the kind of problem."""
        if "labels" not in features.labels:
            return {}
        labels, logits = features.labels["labels"], np.stack(outputs)
        if self.problem == NUMBERS:
            return measure_numbers(logits[:, 0], labels)
        return (measure_sets if self.problem == SETS else measure_classes)(logits, labels)

    def write(self, folder: Path, split: str, examples: Sentences, features: Features, outputs: Outputs) -> None:
        """predictions_SPLIT.tsv: index, prediction and the probability of each label; and a benchmark's submission."""
        names = [] if self.problem == NUMBERS else [self.config.id2label[i] for i in range(self.config.num_labels)]
        predictions, rows = [], []
        for index, answer, logits in zip(
            examples.indices, self.answers(examples, features, outputs), outputs, strict=True
        ):
            if self.problem == NUMBERS:
                prediction, scores = f"{answer['score']:.6g}", []
            elif self.problem == SETS:
                prediction, scores = SEPARATOR.join(answer["labels"]), 1 / (1 + np.exp(-logits))
            else:
                prediction, scores = answer["label"], softmax(logits)
            predictions.append(prediction)
            rows.append([index, prediction, *(f"{score:.6g}" for score in scores)])
        write_rows(folder / f"predictions_{split}.tsv", ["index", "prediction", *names], rows)
        if split == "test" and self.benchmark is not None and self.benchmark.submission is not None:
            if self.problem == NUMBERS:  # the server takes scores from 0 to 5
                predictions = [f"{min(max(float(value), 0), 5):.3f}" for value in predictions]
            sent = zip(examples.indices, predictions, strict=True)
            write_rows(folder / f"{self.benchmark.submission}.tsv", ["index", "prediction"], sent)

    def confusion(self, examples: Sentences, features: Features, outputs: Outputs) -> Confusion | None:
        """Of labels that exclude each other."""
        if self.problem != CLASSES or "labels" not in features.labels:
            return None
        names = [self.config.id2label[i] for i in range(self.config.num_labels)]
        return names, confusion(features.labels["labels"], np.stack(outputs).argmax(1), len(names))

    def parse(self, lines: Sequence[str]) -> Sentences:
        """A text a line, the two of a pair with a tab between."""
        parts = [line.split("\t", 1) for line in lines]
        texts = [tuple(part) if len(part) == 2 else part[0] for part in parts]
        return Sentences(texts, None, [""] * len(texts), list(map(str, range(len(texts)))))

    def _labels(self, values: list, column: str, where: list[str]) -> list:
        """As they are written; None in bad rows."""
        labels = []
        for value, place in zip(values, where, strict=True):
            if self.problem == SETS:
                names = value if isinstance(value, list) else (value or "").split(SEPARATOR)
                labels.append([str(name).strip() for name in names if str(name).strip()])
            elif value is None or value == "":
                self.bad.add(f"{place}: no label in column {column!r}")
                labels.append(None)
            else:
                labels.append(value if isinstance(value, str) else json.dumps(value))
        return labels

    def _encode(self, examples: Sentences) -> tuple[np.ndarray, list[int]]:
        """The labels of good rows, int64 [E], float32 [E] of numbers or float32 [E, labels] of sets; and those rows."""
        numbers = label_numbers(self.config)
        encoded, good = [], []
        for row, label in enumerate(examples.labels):
            value = _encoded(label, numbers, self.problem, examples.where[row], self.bad)
            if value is not None:
                encoded.append(value)
                good.append(row)
        if not good:
            raise ValueError("no row with a label that can be used is left")
        return np.array(encoded, np.int64 if self.problem == CLASSES else np.float32), good


def label_numbers(config: BertConfig) -> dict[str, int]:
    """The number of each label by its name, or by itself where labels were never named."""
    unnamed = {str(i): i for i, name in config.id2label.items() if name == f"LABEL_{i}"}
    return unnamed | {name: i for i, name in config.id2label.items()}


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


def softmax(logits: np.ndarray) -> np.ndarray:
    """Of the last dimension."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def _encoded(label, numbers: dict[str, int], problem: str, where: str, bad: BadRows):
    if problem == NUMBERS:
        try:
            value = float(label)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return value
        return bad.add(f"{where}: the label {label!r} is not a finite number, which a regression wants")
    for name in label if problem == SETS else [label]:
        if name not in numbers:
            known = ", ".join([*numbers][:_NAMES_SHOWN]) + (", …" if len(numbers) > _NAMES_SHOWN else "")
            return bad.add(f"{where}: the label {name!r} is none of those known: {known}")
    if problem == CLASSES:
        return numbers[label]
    present = np.zeros(max(numbers.values()) + 1, np.float32)
    present[[numbers[name] for name in label]] = 1
    return present
