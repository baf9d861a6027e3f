"""Sequence classification of texts and pairs of texts: single-label, multi-label or regression.

Shapes: E examples.
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
from bertfast.tasks import metrics as task_metrics
from bertfast.tasks.features import Features, ModelInputs, tokenize
from bertfast.tasks.glue import BENCHMARKS, Benchmark
from bertfast.tasks.metrics import classification_metrics, multi_label_metrics, regression_metrics
from bertfast.tasks.settings import TaskSettings
from bertfast.tasks.tables import BadRows, Table, read_table
from bertfast.tasks.task import ConfusionMatrix, Outputs, Prediction, Task, label_to_id, write_rows

TEXT_COLUMNS = ("sentence", "sentence1", "text")
TEXT_PAIR_COLUMN = "sentence2"
LABEL_COLUMN = "label"
LABEL_SEPARATOR = ","  # of several labels in one field

# Values of `problem_type` in a model's configuration.
SINGLE_LABEL, REGRESSION, MULTI_LABEL = "single_label_classification", "regression", "multi_label_classification"
PROBLEM_TYPES = {"sequence-classification": SINGLE_LABEL, "regression": REGRESSION, "multi-label": MULTI_LABEL}
METRICS = {
    SINGLE_LABEL: task_metrics.CLASSIFICATION,
    REGRESSION: task_metrics.REGRESSION,
    MULTI_LABEL: task_metrics.MULTI_LABEL,
}
_MAX_LABELS_SHOWN = 10  # in error messages

Text = str | tuple[str, str]
"""A text or a pair of texts."""
Label = str | list[str]
"""A label as written in the file, or the list of an example's labels if there may be several."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table."""

    text: str
    text_pair: str | None
    label: str

    @classmethod
    def choose(cls, table: Table, text: str | None, text_pair: str | None, label: str | None) -> Columns:
        """Return the named columns; for those that are None, the default names if the table has them.

        Raises:
            ValueError: `text` is None and the table has none of `TEXT_COLUMNS`.
        """
        if text is None:
            text = next((name for name in TEXT_COLUMNS if name in table.columns), None)
        if text is None:
            raise ValueError(
                f"{table.path} has none of the columns {', '.join(TEXT_COLUMNS)}, only "
                f"{', '.join(map(repr, table.columns))}: name the text column with --text-column"
            )
        if text_pair is None and TEXT_PAIR_COLUMN in table.columns:
            text_pair = TEXT_PAIR_COLUMN
        return cls(text, text_pair, label or LABEL_COLUMN)

    def texts(self, table: Table) -> list[Text]:
        """Return the texts of the table's rows, or the pairs of texts if there is a second text column."""
        texts: list[Text] = [*table.texts(self.text)]
        if self.text_pair is not None:
            texts = list(zip(table.texts(self.text), table.texts(self.text_pair), strict=True))
        return texts


@dataclass(frozen=True, eq=False)
class TextExamples:
    """Texts or pairs of texts, with labels if they are known.

    Attributes:
        texts: The texts, or pairs of texts.
        labels: Label of each example; None: unknown.
        where: File and line of each example.
        indices: Index of each example in a benchmark's test file, else its number from 0.
    """

    texts: list[Text]
    labels: list[Label] | None
    where: list[str]
    indices: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Sequence[int]) -> TextExamples:
        """Return the examples at `rows`."""
        labels = None if self.labels is None else [self.labels[row] for row in rows]
        where, indices = ([values[row] for row in rows] for values in (self.where, self.indices))
        return TextExamples([self.texts[row] for row in rows], labels, where, indices)


class SequenceClassificationTask(Task[TextExamples]):
    """Sequence classification.

    Attributes:
        benchmark: The GLUE task that the settings name, if any.
        columns: Names of the text, text-pair and label columns; None: default names.
        problem_type: `SINGLE_LABEL`, `REGRESSION` or `MULTI_LABEL`; None until labels or a model are known.
    """

    model_class = BertForSequenceClassification
    head_prefix = "classifier."

    def __init__(self, settings: TaskSettings):
        super().__init__(settings)
        self.benchmark: Benchmark | None = BENCHMARKS.get(settings.task)
        columns = settings.columns
        self.columns = (columns.text_column, columns.text_pair_column, columns.label_column)
        self.problem_type = PROBLEM_TYPES.get(settings.task)
        if self.benchmark is not None:
            text, text_pair, label = self.columns
            self.columns = (
                text or self.benchmark.text,
                text_pair or self.benchmark.pair,
                label or self.benchmark.label,
            )
            self.problem_type = REGRESSION if self.benchmark.regression else SINGLE_LABEL

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics of the benchmark first, then those of the problem type."""
        if self.problem_type is None:
            raise RuntimeError("the metrics depend on the problem type: call label_config or set_config first")
        of_problem = METRICS[self.problem_type]
        if self.benchmark is None:
            return of_problem
        return (*self.benchmark.metrics, *(name for name in of_problem if name not in self.benchmark.metrics))

    def read(self, path: str, *, labelled: bool) -> TextExamples:
        """Read a .tsv, .csv or .jsonl file; see `Task.read`."""
        header = self.benchmark.header if self.benchmark is not None and labelled else None
        table = read_table(path, header=header, bad=self.bad_rows)
        columns = Columns.choose(table, *self.columns)
        if labelled and self.benchmark is not None and self.benchmark.unlabelled is not None:
            label = table.column(columns.label)
            table = table.rows(row for row in range(len(table)) if label[row] != self.benchmark.unlabelled)
        where = [table.where(row) for row in range(len(table))]
        indices = table.columns.get("index", [str(row) for row in range(len(table))])
        examples = TextExamples(columns.texts(table), None, where, indices)
        if not labelled and columns.label not in table.columns:
            return examples
        labels = self._labels(table.column(columns.label), columns.label, where)
        usable = [row for row, label in enumerate(labels) if label is not None]
        return replace(examples.select(usable), labels=[label for label in labels if label is not None])

    def label_config(self, examples: TextExamples) -> dict[str, Any]:
        """Return the number of labels, their names and the problem type."""
        labels = [name for label in examples.labels or [] for name in _names(label)]
        if self.problem_type is None:
            self.problem_type = REGRESSION if has_fractions(labels) else SINGLE_LABEL
        names = ["LABEL_0"] if self.problem_type == REGRESSION else sorted_labels(labels)
        return {"num_labels": len(names), "id2label": dict(enumerate(names)), "problem_type": self.problem_type}

    def set_config(self, config: BertConfig) -> None:
        """Use the labels and the problem type of a model's configuration; see `Task.set_config`."""
        super().set_config(config)
        of_model = config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE_LABEL)
        if self.problem_type not in (None, of_model):
            raise ValueError(f"the model was trained for {of_model.replace('_', ' ')}, not for {self.settings.task}")
        self.problem_type = of_model

    def featurize(self, examples: TextExamples, tokenizer: Tokenizer, max_length: int) -> tuple[TextExamples, Features]:
        """Tokenize each text or pair as one sequence; see `Task.featurize`."""
        labels = {}
        if examples.labels is not None:
            encoded, usable = self._encode_labels(examples)
            examples, labels = examples.select(usable), {"labels": encoded}
        return examples, replace(tokenize(tokenizer, examples.texts, max_length), labels=labels)

    def logits(self, model: PreTrainedModel, inputs: ModelInputs) -> Tensor:
        """Compute logits [E, labels]."""
        return sequence_logits(model, inputs.packed(model))

    def loss(self, model: PreTrainedModel, inputs: ModelInputs, items: Tensor) -> Tensor:
        """Compute the loss of the problem type: cross-entropy, binary cross-entropy or squared error."""
        return sequence_classification_loss(model, inputs.packed(model), inputs.arguments["labels"], items)

    def predictions(self, examples: TextExamples, features: Features, outputs: Outputs) -> Iterator[Prediction]:
        """Yield {"label", "score"} with its probability; {"score"} of a regression; {"labels"} with a probability for
        each predicted label if multi-label."""
        names = self.label_names
        for logits in outputs:
            if self.problem_type == REGRESSION:
                yield {"score": float(logits[0])}
            elif self.problem_type == MULTI_LABEL:
                scores = _sigmoid(logits)
                yield {"labels": {names[i]: float(scores[i]) for i in np.flatnonzero(scores > 0.5)}}
            else:
                scores = softmax(logits)
                yield {"label": names[int(scores.argmax())], "score": float(scores.max())}

    def compute_metrics(self, examples: TextExamples, features: Features, outputs: Outputs) -> dict[str, float]:
        """Compute the metrics of the problem type."""
        if "labels" not in features.labels:
            return {}
        labels, logits = features.labels["labels"], np.stack(outputs)
        if self.problem_type == REGRESSION:
            return regression_metrics(logits[:, 0], labels)
        return (multi_label_metrics if self.problem_type == MULTI_LABEL else classification_metrics)(logits, labels)

    def write_predictions(
        self, folder: Path, split: str, examples: TextExamples, features: Features, outputs: Outputs
    ) -> None:
        """Write predictions_SPLIT.tsv (index, prediction, probability of each label) and the test set's submission."""
        regression = self.problem_type == REGRESSION
        names = [] if regression else self.label_names
        scores: np.ndarray
        values, rows = [], []
        for index, prediction, logits in zip(
            examples.indices, self.predictions(examples, features, outputs), outputs, strict=True
        ):
            if regression:
                value, scores = f"{prediction['score']:.6g}", np.empty(0)
            elif self.problem_type == MULTI_LABEL:
                value, scores = LABEL_SEPARATOR.join(prediction["labels"]), _sigmoid(logits)
            else:
                value, scores = prediction["label"], softmax(logits)
            values.append(value)
            rows.append([index, value, *(f"{score:.6g}" for score in scores)])
        write_rows(folder / f"predictions_{split}.tsv", ["index", "prediction", *names], rows)
        if split == "test" and self.benchmark is not None and self.benchmark.submission is not None:
            if regression:  # the evaluation server accepts scores from 0 to 5
                values = [f"{min(max(float(value), 0), 5):.3f}" for value in values]
            submitted = zip(examples.indices, values, strict=True)
            write_rows(folder / f"{self.benchmark.submission}.tsv", ["index", "prediction"], submitted)

    def confusion_matrix(self, examples: TextExamples, features: Features, outputs: Outputs) -> ConfusionMatrix | None:
        """Return the confusion matrix of single-label classification; see `Task.confusion_matrix`."""
        if self.problem_type != SINGLE_LABEL or "labels" not in features.labels:
            return None
        names = self.label_names
        predictions = np.stack(outputs).argmax(1)
        return names, task_metrics.confusion_matrix(features.labels["labels"], predictions, len(names))

    def parse_lines(self, lines: Sequence[str]) -> TextExamples:
        """Parse one text per line, or a pair separated by a tab."""
        parts = [line.split("\t", 1) for line in lines]
        texts: list[Text] = [(part[0], part[1]) if len(part) == 2 else part[0] for part in parts]
        return TextExamples(texts, None, [""] * len(texts), list(map(str, range(len(texts)))))

    def _labels(self, values: list[Any], column: str, where: list[str]) -> list[Label | None]:
        """Return labels as strings (lists of them if multi-label); None for bad rows."""
        labels: list[Label | None] = []
        for value, location in zip(values, where, strict=True):
            if self.problem_type == MULTI_LABEL:
                names = value if isinstance(value, list) else (value or "").split(LABEL_SEPARATOR)
                labels.append([str(name).strip() for name in names if str(name).strip()])
            elif value is None or value == "":
                self.bad_rows.add(f"{location}: no label in column {column!r}")
                labels.append(None)
            else:
                labels.append(value if isinstance(value, str) else json.dumps(value))
        return labels

    def _encode_labels(self, examples: TextExamples) -> tuple[np.ndarray, list[int]]:
        """Encode labels as the model's targets.

        Returns:
            Targets of usable rows: int64 [E], float32 [E] (regression) or float32 [E, labels] (multi-label); and the
            indices of those rows.
        """
        ids = label_to_id(self.config)
        targets, usable = [], []
        for row, label in enumerate(examples.labels or []):
            target = _encode_label(_names(label), ids, self.problem_type, examples.where[row], self.bad_rows)
            if target is not None:
                targets.append(target)
                usable.append(row)
        if not usable:
            raise ValueError("no row has a usable label")
        return np.array(targets, np.int64 if self.problem_type == SINGLE_LABEL else np.float32), usable


def sorted_labels(labels: list[str]) -> list[str]:
    """Return the distinct labels, sorted by value if all are integers, else alphabetically.

    Raises:
        ValueError: There is only one distinct label.
    """
    names = set(labels)
    if len(names) < 2:
        raise ValueError(f"every label is {labels[0]!r}; classification needs at least two different labels")
    return sorted(names, key=int if all(name.removeprefix("-").isdecimal() for name in names) else None)


def has_fractions(labels: list[str]) -> bool:
    """Return whether all labels are numbers, and at least one is not an integer."""
    try:
        return not all(float(label).is_integer() for label in labels)
    except ValueError:
        return False


def softmax(logits: np.ndarray) -> np.ndarray:
    """Compute the softmax over the last dimension."""
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities: np.ndarray = exponentials / exponentials.sum(-1, keepdims=True)
    return probabilities


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    probabilities: np.ndarray = 1 / (1 + np.exp(-logits))
    return probabilities


def _names(label: Label) -> list[str]:
    return label if isinstance(label, list) else [label]


def _encode_label(
    names: list[str], ids: dict[str, int], problem_type: str | None, where: str, bad: BadRows
) -> float | np.ndarray | None:
    """Return the target of one example: a number, an id, or float32 [labels] of 0 and 1; None for a bad row.

    Args:
        names: Labels of the example: one, or any number if multi-label.
        ids: Id of each label by its name.
        problem_type: Problem type of the model.
        where: File and line of the example.
        bad: Collects bad rows.
    """
    if problem_type == REGRESSION:
        try:
            value = float(names[0])
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return value
        bad.add(f"{where}: the label {names[0]!r} is not a finite number, which regression requires")
        return None
    for name in names:
        if name not in ids:
            known = ", ".join([*ids][:_MAX_LABELS_SHOWN]) + (", …" if len(ids) > _MAX_LABELS_SHOWN else "")
            bad.add(f"{where}: unknown label {name!r}; known labels: {known}")
            return None
    if problem_type == SINGLE_LABEL:
        return ids[names[0]]
    multi_hot = np.zeros(max(ids.values()) + 1, np.float32)
    multi_hot[[ids[name] for name in names]] = 1
    return multi_hot
