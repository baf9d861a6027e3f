"""The interface of a task (reading, featurising, loss, metrics, predictions)."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

from bertfast.tasks.features import Features, ModelInputs
from bertfast.tasks.settings import TaskSettings
from bertfast.tasks.tables import BadRows

Outputs = Sequence[np.ndarray]
"""Logits of each example: float32 [labels], or [tokens, labels] if each token has its own."""
ConfusionMatrix = tuple[list[str], np.ndarray]
"""Names of the labels, and int64 [labels, labels]: examples by true label (row) and predicted label (column)."""


class Task(ABC):
    """A kind of task: from files to features, and from a model's logits to predictions and metrics.

    Examples are whatever `read` returns; they have a length. For fine-tuning, call `label_config` after reading the
    training file; for a fine-tuned model, call `set_config` with its configuration.

    Attributes:
        model_class: Class of the model to open; a fine-tuned model may replace it.
        feature_based_model: The model class that trains on the hidden states of a frozen encoder; None: not supported.
        head_prefix: Prefix of the names of the head's weights, without which predictions are meaningless.
        metrics: Names of metrics; the first selects the best model. "loss" is better lower, all others higher.
    """

    model_class: type[PreTrainedModel]
    feature_based_model: ClassVar[type[PreTrainedModel] | None] = None
    head_prefix: ClassVar[str]
    metrics: tuple[str, ...]

    def __init__(self, settings: TaskSettings):
        self.settings, self.bad_rows = settings, BadRows(settings.columns.on_bad_rows)
        self.config: BertConfig | None = None

    @abstractmethod
    def read(self, path: str, *, labelled: bool) -> Any:
        """Read the examples of a file.

        Args:
            path: The file.
            labelled: Whether each example must have a label. If False, labels may be missing; existing ones are kept.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is malformed, or a row cannot be used and `on_bad_rows` is "stop".
        """

    def label_config(self, examples: Any) -> dict[str, Any]:
        """Return the entries of a model's configuration that follow from the training examples, such as `id2label`."""
        return {}

    def set_config(self, config: BertConfig) -> None:
        """Use the labels of a model's configuration.

        Raises:
            ValueError: The model was trained for another kind of problem than the settings name.
        """
        self.config = config

    @abstractmethod
    def featurize(self, examples: Any, tokenizer: Tokenizer, max_length: int) -> tuple[Any, Features]:
        """Tokenize examples.

        Args:
            examples: What `read` or `parse_lines` returned.
            tokenizer: The model's tokenizer.
            max_length: Maximum tokens per sequence, special tokens included.

        Returns:
            The examples without those that cannot be used, and their features, with labels if the examples have any.
        """

    @abstractmethod
    def logits(self, model: PreTrainedModel, inputs: ModelInputs) -> Tensor:
        """Compute logits [E, labels], or [1, T, labels] if each token has its own."""

    @abstractmethod
    def loss(self, model: PreTrainedModel, inputs: ModelInputs, items: Tensor) -> Tensor:
        """Compute a batch's contribution to the mean loss of its optimizer step, which is over `items` labels."""

    @abstractmethod
    def predictions(self, examples: Any, features: Features, outputs: Outputs) -> Iterator[dict]:
        """Yield the prediction for each example, as `bertfast predict` prints it."""

    @abstractmethod
    def compute_metrics(self, examples: Any, features: Features, outputs: Outputs) -> dict[str, float]:
        """Compute the metrics; empty if the examples have no labels."""

    @abstractmethod
    def write_predictions(self, folder: Path, split: str, examples: Any, features: Features, outputs: Outputs) -> None:
        """Write predictions into `folder`, in the benchmark's submission format if it has one."""

    @abstractmethod
    def parse_lines(self, lines: Sequence[str]) -> Any:
        """Return examples from lines of standard input."""

    def confusion_matrix(self, examples: Any, features: Features, outputs: Outputs) -> ConfusionMatrix | None:
        """Return the confusion matrix; None if the task has none or the examples have no labels."""
        return None


def write_atomically(path: Path, text: str) -> None:
    """Write a file by renaming a complete temporary file, so that readers never see a partial one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_rows(path: Path, header: Iterable[str], rows: Iterable[Iterable]) -> None:
    """Write a .tsv file."""
    lines = ["\t".join(header), *("\t".join(map(str, row)) for row in rows)]
    write_atomically(path, "\n".join(lines) + "\n")


def json_lines(lines: Sequence[str], example: str) -> list[dict]:
    """Parse lines of standard input, each a JSON object; ValueError, showing `example`, if one is not."""
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            raise ValueError(f"line {number} of standard input is not a JSON object such as {example}")
        objects.append(value)
    return objects
