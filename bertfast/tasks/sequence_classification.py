"""Sequence classification of texts and pairs of texts: single-label, multi-label or regression.

Shapes: E examples.
"""

from __future__ import annotations

import logging
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
from bertfast.tasks.class_report import class_scores, precision_recall
from bertfast.tasks.columns import LABEL_COLUMN, Columns, Text
from bertfast.tasks.features import Features, ModelInputs, tokenize
from bertfast.tasks.glue import BENCHMARKS, Benchmark, infer_benchmark
from bertfast.tasks.labels import (
    LABEL_SEPARATOR,
    LONGEST_LABEL,
    MULTI_LABEL,
    PROBLEM_TYPES,
    REGRESSION,
    SINGLE_LABEL,
    Label,
    LabelEncoder,
    has_fractions,
    names_of,
    read_label,
    require_classes,
    shown,
    sorted_labels,
    sorted_numbers,
    undefined_metrics,
)
from bertfast.tasks.metrics import classification_metrics, multi_label_metrics, regression_metrics
from bertfast.tasks.rows import Rows
from bertfast.tasks.settings import TaskSettings
from bertfast.tasks.tables import Table, not_text, read_chunks, read_table
from bertfast.tasks.task import (
    ROWS_PER_CHUNK,
    ConfusionMatrix,
    Outputs,
    Prediction,
    Task,
    label_to_id,
    usable_labels,
    write_aligned,
    write_rows,
)

_FEW_LABELS = 20  # more, if most have a single example, are probably no labels

METRICS = {
    SINGLE_LABEL: task_metrics.CLASSIFICATION,
    REGRESSION: task_metrics.REGRESSION,
    MULTI_LABEL: task_metrics.MULTI_LABEL,
}

logger = logging.getLogger("bertfast")


@dataclass(frozen=True, eq=False)
class TextExamples:
    """Texts or pairs of texts, with labels if they are known.

    Attributes:
        texts: The texts, or pairs of texts.
        rows: The rows that they come from.
        labels: Label of each example; None: unknown.
        optional: Whether examples without a usable label are usable.
    """

    texts: list[Text]
    rows: Rows
    labels: list[Label] | None = None
    optional: bool = False

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Sequence[int]) -> TextExamples:
        """Return the examples at `indices`."""
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return TextExamples([self.texts[i] for i in indices], self.rows.select(indices), labels, self.optional)


class SequenceClassificationTask(Task[TextExamples]):
    """Sequence classification.

    Attributes:
        benchmark: The GLUE task that the settings name, if any.
        columns: Names of the text, text-pair and label columns; None: default names.
        problem_type: `SINGLE_LABEL`, `REGRESSION` or `MULTI_LABEL`; None until labels or a model are known.
        label_column: Column of the labels in the last file with labels.
    """

    model_class = BertForSequenceClassification
    flags = frozenset({"--text-column", "--text-pair-column", "--label-column"})

    def __init__(self, settings: TaskSettings):
        super().__init__(settings)
        self.label_column = LABEL_COLUMN
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
        """Read a .tsv, .csv, .jsonl or .json file; see `Task.read`."""
        table = read_table(path, bad=self.bad_rows)
        columns, benchmark = self._choose_columns(table)
        if labelled:
            self._adopt(benchmark)
            self.label_column = columns.label
            table = self._labelled_rows(table, columns.label, benchmark)
        elif columns.label not in table.columns:
            return self._examples(table, columns)
        table = columns.with_texts(table)
        if labelled and not len(table):
            raise ValueError(f"{path} has no row with a text and a label")
        if labelled:
            table.texts(columns.text)  # raises if all are blank
        labels = [read_label(value, self.problem_type) for value in table.column(columns.label)]
        return replace(self._examples(table, columns), labels=labels, optional=not labelled)

    def read_chunks(self, path: str) -> Iterator[TextExamples]:
        """Yield the texts of a file in parts; see `Task.read_chunks`."""
        columns = None
        for table in read_chunks(path, ROWS_PER_CHUNK, bad=self.bad_rows):
            if columns is None:
                columns, benchmark = self._choose_columns(table)
                named = self.columns[0] is not None or benchmark is not None
            columns.require_all_texts(table, text_named=named)
            yield self._examples(table, columns)

    def label_config(self, examples: TextExamples) -> dict[str, Any]:
        """Return the number of labels, their names and the problem type."""
        labels = [name for label in examples.labels or [] for name in names_of(label)]
        if self.problem_type is None:
            self.problem_type = REGRESSION if has_fractions(labels) else SINGLE_LABEL
            self._report_problem_type(labels)
        if self.problem_type == REGRESSION:
            names = ["LABEL_0"]
        else:
            names = sorted_labels(labels)
            require_classes(names, examples.rows.file)
            if len(names) > max(len(labels) / 2, _FEW_LABELS):
                counted = f"{examples.rows.file}: {len(names)} different labels in {len(examples)} rows"
                logger.warning("%s: is %r the column of the labels? (--label-column)", counted, self.label_column)
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
            targets, usable = self._encode_labels(examples.labels, examples)
            if targets is not None:
                examples, labels = examples.select(usable), {"labels": targets}
        return examples, replace(tokenize(tokenizer, examples.texts, max_length), labels=labels)

    def logits(self, model: PreTrainedModel, inputs: ModelInputs) -> Tensor:
        """Compute logits [E, labels]."""
        return sequence_logits(model, inputs.packed(model))

    def loss(self, model: PreTrainedModel, inputs: ModelInputs, items: Tensor) -> Tensor:
        """Compute the loss of the problem type: cross-entropy, binary cross-entropy or squared error."""
        return sequence_classification_loss(model, inputs.packed(model), inputs.arguments["labels"], items)

    def texts(self, examples: TextExamples) -> Iterator[dict[str, str]]:
        """Yield {"text"}, or {"text", "text_pair"}."""
        for text in examples.texts:
            yield {"text": text} if isinstance(text, str) else {"text": text[0], "text_pair": text[1]}

    def predictions(self, examples: TextExamples, features: Features, outputs: Outputs) -> Iterator[Prediction]:
        """Yield {"label", "score"} with its probability; {"score"} of a regression; {"labels"} with a probability for
        each predicted label if multi-label."""
        names = self.label_names
        for logits in outputs:
            if self.problem_type == REGRESSION:
                yield {"score": float(logits[0])}
            elif self.problem_type == MULTI_LABEL:
                scores = sigmoid(logits)
                yield {"labels": {names[i]: float(scores[i]) for i in np.flatnonzero(scores > 0.5)}}
            else:
                scores = softmax(logits)
                yield {"label": names[int(scores.argmax())], "score": float(scores.max())}

    @property
    def has_probabilities(self) -> bool:
        """Whether the labels are classes."""
        return self.problem_type != REGRESSION

    def probabilities(self, examples: TextExamples, outputs: Outputs) -> Iterator[dict[str, float]]:
        """Yield the probability of each label by its name."""
        names, normalise = self.label_names, sigmoid if self.problem_type == MULTI_LABEL else softmax
        return (dict(zip(names, normalise(logits).tolist(), strict=True)) for logits in outputs)

    def unmeasurable(self, examples: TextExamples, features: Features) -> dict[str, str]:
        """Return correlations with a constant, and metrics of classes that do not occur; see `Task.unmeasurable`."""
        labels = features.labels.get("labels")
        return {} if labels is None else undefined_metrics(labels, self.problem_type, self.label_names)

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
        """Write predictions_SPLIT.tsv (row, id, prediction, probability of each label) and a submission."""
        regression = self.problem_type == REGRESSION
        names = [] if regression else self.label_names
        scores: np.ndarray
        values, rows = [], []
        for prediction, logits in zip(self.predictions(examples, features, outputs), outputs, strict=True):
            if regression:
                value, scores = f"{prediction['score']:.6g}", np.empty(0)
            elif self.problem_type == MULTI_LABEL:
                value, scores = LABEL_SEPARATOR.join(prediction["labels"]), sigmoid(logits)
            else:
                value, scores = prediction["label"], softmax(logits)
            values.append(value)
            rows.append([value, *(f"{score:.6g}" for score in scores)])
        write_aligned(folder / f"predictions_{split}.tsv", examples.rows, ["prediction", *names], rows)
        if split == "test" and self.benchmark is not None and self.benchmark.submission is not None:
            if regression:  # the evaluation server accepts scores from 0 to 5
                values = [f"{min(max(float(value), 0), 5):.3f}" for value in values]
            self._write_submission(folder / f"{self.benchmark.submission}.tsv", examples.rows, values)

    def confusion_matrix(self, examples: TextExamples, features: Features, outputs: Outputs) -> ConfusionMatrix | None:
        """Return the confusion matrix of single-label classification; see `Task.confusion_matrix`."""
        if self.problem_type != SINGLE_LABEL or "labels" not in features.labels:
            return None
        names = self.label_names
        predictions = np.stack(outputs).argmax(1)
        return names, task_metrics.confusion_matrix(features.labels["labels"], predictions, len(names))

    def report(self, examples: TextExamples, features: Features, outputs: Outputs) -> dict[str, Any]:
        """Return the scores of each label; of two classes also the precision-recall curve of the second."""
        found = super().report(examples, features, outputs)
        labels, names = features.labels.get("labels"), self.label_names
        if labels is None:
            return found
        if self.problem_type == MULTI_LABEL:
            predicted, actual = np.stack(outputs) > 0, labels > 0
            counts = ((predicted & actual).sum(0), predicted.sum(0), actual.sum(0))
            found["classes"] = class_scores(names, *counts)
        elif found and len(names) == 2 and (labels == 1).any():
            probabilities = np.array([softmax(logits)[1] for logits in outputs])
            found["precision_recall"] = precision_recall(names[1], probabilities, labels == 1)
        return found

    def parse_lines(self, lines: Sequence[str], first_row: int = 1) -> TextExamples:
        """Parse one text per line, or a pair separated by a tab."""
        rows = Rows.of_input(len(lines), first_row, self.bad_rows)
        texts: list[Text] = []
        usable = []
        for index, line in enumerate(lines):
            text, *others = line.split("\t")
            if len(others) > 1:
                rows.reject(index, f"{len(others) + 1} fields separated by tabs: give one text, or two")
                continue
            texts.append((text, others[0]) if others else text)
            usable.append(index)
        return TextExamples(texts, rows.select(usable))

    def _choose_columns(self, table: Table) -> tuple[Columns, Benchmark | None]:
        """Return the columns of a table, and the benchmark that the settings name or whose columns these are."""
        benchmark = self.benchmark
        if benchmark is None and not any(self.columns) and (name := infer_benchmark(table.columns)) is not None:
            benchmark = BENCHMARKS[name]
            logger.info("inferred --task %s from the columns of %s", name, table.path)
        text, text_pair, label = self.columns
        if benchmark is not None:
            text, text_pair = text or benchmark.text, text_pair or benchmark.pair
            label = label or benchmark.label
        return Columns.choose(table, text, text_pair, label), benchmark

    def _adopt(self, benchmark: Benchmark | None) -> None:
        """Use the metrics and the submission format of the benchmark whose columns the training file has."""
        if benchmark is not None and self.settings.task == "auto" and self.problem_type is None:
            self.benchmark = benchmark
            self.problem_type = REGRESSION if benchmark.regression else SINGLE_LABEL

    def _examples(self, table: Table, columns: Columns) -> TextExamples:
        table = columns.with_texts(table)
        return TextExamples(columns.texts(table), table.rows)

    def _labelled_rows(self, table: Table, column: str, benchmark: Benchmark | None) -> Table:
        """Return the rows that have a label."""
        labelled, rows = [], table.rows
        for row, value in enumerate(table.column(column)):
            if benchmark is not None and value == benchmark.unlabelled:
                rows.leave_out(row, "no gold label")
            elif isinstance(value, (list, dict)) and self.problem_type != MULTI_LABEL:
                rows.reject(row, f"column {column!r} {not_text(value)}; for several labels use --task multi-label")
            elif (label := read_label(value, self.problem_type)) == [""]:
                rows.reject(
                    row, f"column {column!r} {not_text(value)} or a list of texts; write [] if no label applies"
                )
            elif label == "":
                rows.reject(row, f"no label in column {column!r}")
            elif (longest := max(map(len, names_of(label)), default=0)) > LONGEST_LABEL:
                problem = f"the label in column {column!r} has {longest:,} characters, more than {LONGEST_LABEL:,}"
                rows.reject(row, f"{problem}: name the column of the labels with --label-column")
            else:
                labelled.append(row)
        return table.select(labelled)

    def _encode_labels(self, labels: list[Label], examples: TextExamples) -> tuple[np.ndarray | None, list[int]]:
        """Encode labels as the model's targets.

        Returns:
            Targets of usable rows: int64 [E], float32 [E] (regression) or float32 [E, labels] (multi-label); and the
            indices of those rows. The targets are None if labels are optional and one is missing.
        """
        encoder, rows = LabelEncoder(label_to_id(self.config), self.problem_type), examples.rows
        found = usable_labels(labels, encoder.target, rows, labelled=not examples.optional)
        if found is None:
            return None, []
        targets, usable = found
        if not usable:
            raise ValueError(f"{rows.file}: no row has a usable label")
        if examples.optional and self.problem_type == REGRESSION and {*targets} == {-1.0}:
            logger.warning("no metrics of %s: every label is -1, which stands for no label", rows.file)
            return None, []
        return np.array(targets, np.int64 if self.problem_type == SINGLE_LABEL else np.float32), usable

    def _report_problem_type(self, labels: list[str]) -> None:
        names = sorted_numbers(labels) if self.problem_type == REGRESSION else sorted_labels(labels)
        task = next(name for name, problem_type in PROBLEM_TYPES.items() if problem_type == self.problem_type)
        logger.info("inferred --task %s from labels %s in column %r", task, shown(names), self.label_column)

    @staticmethod
    def _write_submission(path: Path, rows: Rows, values: list[str]) -> None:
        """Write a file for the evaluation server: the id of each row, else its number from 0, and its prediction."""
        if rows.file in rows.bad.skipped:
            logger.warning("%s is not written, as rows of %s were skipped", path.name, rows.file)
            return
        indices = rows.ids or [number - 1 for number in rows.numbers]
        write_rows(path, ["index", "prediction"], zip(indices, values, strict=True))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Compute the softmax over the last dimension."""
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities: np.ndarray = exponentials / exponentials.sum(-1, keepdims=True)
    return probabilities


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Compute the logistic function of each element."""
    probabilities: np.ndarray = 1 / (1 + np.exp(-logits))
    return probabilities
