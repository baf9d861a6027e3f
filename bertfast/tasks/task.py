"""The interface of a task (reading, featurising, loss, metrics, predictions)."""

from __future__ import annotations

import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

from bertfast.data.text_files import json_object
from bertfast.runtime.atomic_write import write_atomically
from bertfast.tasks.class_report import confusion_report
from bertfast.tasks.features import Features, ModelInputs
from bertfast.tasks.pretrained import sequence_length
from bertfast.tasks.rows import BadRows, Rows, Skipped
from bertfast.tasks.settings import TaskSettings

logger = logging.getLogger("bertfast")

FINETUNING_TASK = "finetuning_task"  # entry of a model's configuration, as in transformers' example scripts
ROWS_PER_CHUNK = 1000  # rows that are predicted at a time, which bounds memory

Outputs = Sequence[np.ndarray]
"""Logits of each example: float32 [labels], or [tokens, labels] if each token has its own."""
ConfusionMatrix = tuple[list[str], np.ndarray]
"""Names of the labels, and int64 [labels, labels]: examples by true label (row) and predicted label (column)."""
Prediction = dict[str, Any]
"""The prediction for one example: the JSON object that `bertfast predict` prints."""


class HasRows(Protocol):
    """Examples that know the rows they come from."""

    def __len__(self) -> int: ...

    @property
    def rows(self) -> Rows:
        """The row of each example."""

    def select(self, indices: Sequence[int]) -> Any:
        """Return the examples at `indices`."""


Examples = TypeVar("Examples", bound=HasRows)
"""The examples of a task, as its `read` returns them."""
Field = TypeVar("Field")
Label = TypeVar("Label")


class Task(ABC, Generic[Examples]):
    """A kind of task: from files to features, and from a model's logits to predictions and metrics.

    For fine-tuning, call `label_config` with the examples of the training file, and `set_config` with the configuration
    of the model that is made with it; for a fine-tuned model, call `set_config` with its configuration.

    Attributes:
        model_class: Class of the model to open; a fine-tuned model may replace it.
        feature_based_model: The model class that trains on the hidden states of a frozen encoder; None: not supported.
        logits_per_token: Whether each token has its own logits.
        captures: Whether its logits can be computed in a CUDA graph.
        flags: Flags of columns, of question answering and of embeddings that have an effect on the task, besides
            --on-bad-rows.
        settings: Settings of the command.
        bad_rows: Collects the rows that cannot be used.
        known_ids: Hashes of the ids on standard input so far.
    """

    model_class: type[PreTrainedModel]
    feature_based_model: ClassVar[type[PreTrainedModel] | None] = None
    logits_per_token: ClassVar[bool] = False
    captures: ClassVar[bool] = True
    flags: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, settings: TaskSettings):
        self.settings = settings
        self.bad_rows = BadRows(settings.columns.on_bad_rows, " (--on-bad-rows skip leaves such rows out)")
        self.known_ids: set[int] = set()
        self._warnings: set[str] = set()
        self._config: BertConfig | None = None

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of metrics; the first selects the best model. "loss" is better lower, all others higher."""

    @property
    def config(self) -> BertConfig:
        """Configuration of the model; `set_config` must have been called."""
        if self._config is None:
            raise RuntimeError("call set_config before anything that needs the labels of the model")
        return self._config

    @property
    def label_names(self) -> list[str]:
        """Names of the model's labels, by id."""
        return label_names(self.config)

    def open_folder(self, folder: Path) -> Path:
        """Read what a model's folder says besides the encoder's files; return the folder of the encoder.

        Raises:
            ValueError: It says what is not supported.
        """
        return folder

    def write_folder(self, folder: Path, *, adapted: bool) -> None:
        """Write what a fine-tuned model's folder holds besides the encoder's files.

        Args:
            folder: The folder.
            adapted: Whether it gets an adapter instead of a whole model.
        """

    def max_length(self) -> int:
        """Return the maximum tokens per sequence; `set_config` must have been called."""
        return sequence_length(self.settings.max_seq_length, self.config)

    @abstractmethod
    def read(self, path: str, *, labelled: bool) -> Examples:
        """Read the examples of a file.

        Args:
            path: The file.
            labelled: Whether each example must have a label. If False, labels may be missing; existing ones are kept.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is malformed, or a row cannot be used and `on_bad_rows` is "stop".
        """

    def read_chunks(self, path: str) -> Iterator[Examples]:
        """Yield the examples of a file to predict, in parts that bound memory; labels are not read. See `read`."""
        yield self.read(path, labelled=False)

    def label_config(self, examples: Examples) -> dict[str, Any]:
        """Return the entries of a model's configuration that follow from the training examples, such as `id2label`."""
        return {}

    def set_config(self, config: BertConfig) -> None:
        """Use the labels of a model's configuration.

        Raises:
            ValueError: The model was trained for another kind of problem than the settings name.
        """
        self._config = config

    @abstractmethod
    def featurize(self, examples: Examples, tokenizer: Tokenizer, max_length: int) -> tuple[Examples, Features]:
        """Tokenize examples.

        Args:
            examples: What `read` or `parse_lines` returned.
            tokenizer: The model's tokenizer.
            max_length: Maximum tokens per sequence, special tokens included.

        Returns:
            The examples without those that cannot be used, and their features, with labels if the examples have any.
        """

    def without_repetitions(self, features: Features) -> tuple[Features, Callable[[Outputs], Outputs]]:
        """Return features without repetitions, and a function that makes the outputs of examples of their outputs."""
        return features, lambda outputs: outputs

    @abstractmethod
    def logits(self, model: PreTrainedModel, inputs: ModelInputs) -> Tensor:
        """Compute logits [E, labels], or [1, T, labels] if each token has its own."""

    @abstractmethod
    def loss(self, model: PreTrainedModel, inputs: ModelInputs, items: Tensor) -> Tensor:
        """Compute a batch's contribution to the mean loss of its optimizer step, which is over `items` labels."""

    @abstractmethod
    def predictions(self, examples: Examples, features: Features, outputs: Outputs) -> Iterator[Prediction]:
        """Yield the prediction for each example, as `bertfast predict` prints it after the row's number and id."""

    @abstractmethod
    def texts(self, examples: Examples) -> Iterator[dict[str, Any]]:
        """Yield the texts of each row by what they are, as `bertfast predict --echo-texts` prints them."""

    @property
    def has_probabilities(self) -> bool:
        """Whether `probabilities` can be called."""
        return False

    def probabilities(self, examples: Examples, outputs: Outputs) -> Iterator[Any]:
        """Yield the probabilities of all labels for each example, as `bertfast predict --all-probabilities` prints."""
        raise NotImplementedError

    @abstractmethod
    def compute_metrics(self, examples: Examples, features: Features, outputs: Outputs) -> dict[str, float]:
        """Compute the metrics, those that are undefined as NaN; empty if the examples have no labels."""

    def untrainable(self, examples: Examples) -> str | None:
        """Return why nothing can be learned from labelled examples; None: it can. `label_config` has been called."""
        return None

    def unmeasurable(self, examples: Examples, features: Features) -> dict[str, str]:
        """Return the metrics that labelled examples leave undefined for any predictions, and why each is."""
        return {}

    def measure(self, examples: Examples, features: Features, outputs: Outputs) -> dict[str, float]:
        """Compute the metrics that are defined, and warn of the others, once for each file."""
        values, reasons = self.compute_metrics(examples, features, outputs), self.unmeasurable(examples, features)
        undefined = {name: reasons.get(name) for name, x in values.items() if name in reasons or math.isnan(x)}
        for reason in dict.fromkeys(undefined.values()):
            names = ", ".join(name for name, other in undefined.items() if other == reason)
            message = f"{examples.rows.file}: {reason or 'all predictions are equal'}, so {names} cannot be measured"
            if message not in self._warnings:
                logger.warning("%s", message)
            self._warnings.add(message)
        return {name: value for name, value in values.items() if name not in undefined}

    @abstractmethod
    def write_predictions(
        self, folder: Path, split: str, examples: Examples, features: Features, outputs: Outputs
    ) -> None:
        """Write predictions into `folder`, in the benchmark's submission format if it has one.

        There is a prediction for each row of the file, in order; skipped rows are marked (see `Rows.aligned`).
        """

    @abstractmethod
    def parse_lines(self, lines: Sequence[str], first_row: int = 1) -> Examples:
        """Return examples from lines of standard input.

        Args:
            lines: Lines without their ends; each is a row.
            first_row: Number of the first line.
        """

    def confusion_matrix(self, examples: Examples, features: Features, outputs: Outputs) -> ConfusionMatrix | None:
        """Return the confusion matrix; None if the task has none or the examples have no labels."""
        return None

    def report(self, examples: Examples, features: Features, outputs: Outputs) -> dict[str, Any]:
        """Return what there is to say of labelled examples besides the metrics, as JSON; empty: nothing.

        "classes" and "entities" have the scores of each class, "confusion_matrix" labels and counts, and
        "precision_recall" the curve of two classes; see `bertfast.tasks.class_report`.
        """
        table = self.confusion_matrix(examples, features, outputs)
        return {} if table is None else confusion_report(*table)


def label_names(config: BertConfig) -> list[str]:
    """Return the names of a model's labels, by id."""
    names = {int(i): name for i, name in (config.id2label or {}).items()}
    return [names[i] for i in range(len(names))]


def label_to_id(config: BertConfig) -> dict[str, int]:
    """Return the id of each label by its name; labels without names (LABEL_3) are also found as "3"."""
    names = label_names(config)
    unnamed = {str(i): i for i, name in enumerate(names) if name == f"LABEL_{i}"}
    return unnamed | {name: i for i, name in enumerate(names)}


def usable_labels(
    fields: Iterable[Field], parse: Callable[[Field], Label], rows: Rows, *, labelled: bool
) -> tuple[list[Label], list[int]] | None:
    """Parse the label of each row.

    Args:
        fields: What holds the label of each row.
        parse: Returns the label of a field; ValueError with what is wrong if it has none.
        rows: The rows.
        labelled: Whether each row needs a label, so that one without a usable one is rejected.

    Returns:
        The usable labels, and the indices of their rows; None: not all labels of `rows` are known, and no metrics can
        be computed, which is logged.
    """
    labels, usable = [], []
    for index, field in enumerate(fields):
        try:
            labels.append(parse(field))
            usable.append(index)
        except ValueError as error:
            if not labelled:
                where = rows.where(index)
                logger.warning("no metrics of %s, as not all labels are known: %s: %s", rows.file, where, error)
                return None
            rows.reject(index, str(error))
    return labels, usable


def write_rows(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a .tsv file; tabs and line ends in values become spaces."""
    lines = ["\t".join(re.sub(r"[\t\r\n]+", " ", str(value)) for value in row) for row in (header, *rows)]
    write_atomically(path, "\n".join(lines) + "\n")


def write_aligned(path: Path, rows: Rows, header: Sequence[str], values: Iterable[Sequence[object]]) -> None:
    """Write a .tsv file with a line for each row of a data file: its number, its id if it has one, and values.

    Args:
        path: The file to write.
        rows: The rows that have values; a last column "skipped" says why others have none.
        header: Names of the values.
        values: Values of each row.
    """
    lines: list[list[object]] = []
    has_ids, has_skipped = rows.ids is not None, rows.file in rows.bad.skipped
    for number, row_id, value in rows.aligned(values):
        line: list[object] = [number, *(["" if row_id is None else row_id] if has_ids else [])]
        line += [*[""] * len(header), value.problem] if isinstance(value, Skipped) else [*value, *[""] * has_skipped]
        lines.append(line)
    write_rows(path, ["row", *["id"] * has_ids, *header, *["skipped"] * has_skipped], lines)


def json_lines(
    lines: Sequence[str], first_row: int, example: str, bad: BadRows, known_ids: set[int], *required: tuple[str, type]
) -> tuple[list[dict[str, Any]], Rows]:
    """Parse lines of standard input, each a JSON object.

    Args:
        lines: Lines without their ends.
        first_row: Number of the first line.
        example: A valid line, shown in messages.
        bad: Collects lines that are no such objects.
        known_ids: Hashes of the ids of earlier lines; those of these lines are added.
        required: Names and types of the values that each object must have.

    Returns:
        The objects of the usable lines, and their rows.
    """
    rows = Rows.of_input(len(lines), first_row, bad)
    objects, usable = [], []
    for index, line in enumerate(lines):
        try:
            value = json_object(rows.where(index), line, example)
        except ValueError as error:
            bad.add(str(error), file=rows.file, row=rows.numbers[index])
            continue
        missing = next((name for name, kind in required if not isinstance(value.get(name), kind)), None)
        if missing is not None:
            rows.reject(index, f"no {missing!r} as in {example}")
            continue
        if value.get("id") is not None:
            key = hash(str(value["id"]))
            if key in known_ids:
                rows.reject(index, f"the id {value['id']!r} is repeated")
                continue
            known_ids.add(key)
        objects.append(value)
        usable.append(index)
    return objects, rows.select(usable)
