"""The interface of a task (reading, featurising, loss, metrics, predictions)."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

from bertfast.runtime.atomic_write import write_atomically
from bertfast.tasks.features import Features, ModelInputs
from bertfast.tasks.settings import TaskSettings
from bertfast.tasks.tables import BadRows

Outputs = Sequence[np.ndarray]
"""Logits of each example: float32 [labels], or [tokens, labels] if each token has its own."""
ConfusionMatrix = tuple[list[str], np.ndarray]
"""Names of the labels, and int64 [labels, labels]: examples by true label (row) and predicted label (column)."""
Prediction = dict[str, Any]
"""The prediction for one example: the JSON object that `bertfast predict` prints."""

Examples = TypeVar("Examples", bound=Sized)
"""The examples of a task, as its `read` returns them."""


class Task(ABC, Generic[Examples]):
    """A kind of task: from files to features, and from a model's logits to predictions and metrics.

    For fine-tuning, call `label_config` with the examples of the training file, and `set_config` with the configuration
    of the model that is made with it; for a fine-tuned model, call `set_config` with its configuration.

    Attributes:
        model_class: Class of the model to open; a fine-tuned model may replace it.
        feature_based_model: The model class that trains on the hidden states of a frozen encoder; None: not supported.
        head_prefix: Prefix of the names of the head's weights, without which predictions are meaningless.
        settings: Settings of the command.
        bad_rows: Counts the rows that cannot be used.
    """

    model_class: type[PreTrainedModel]
    feature_based_model: ClassVar[type[PreTrainedModel] | None] = None
    head_prefix: ClassVar[str]

    def __init__(self, settings: TaskSettings):
        self.settings, self.bad_rows = settings, BadRows(settings.columns.on_bad_rows)
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

    @abstractmethod
    def logits(self, model: PreTrainedModel, inputs: ModelInputs) -> Tensor:
        """Compute logits [E, labels], or [1, T, labels] if each token has its own."""

    @abstractmethod
    def loss(self, model: PreTrainedModel, inputs: ModelInputs, items: Tensor) -> Tensor:
        """Compute a batch's contribution to the mean loss of its optimizer step, which is over `items` labels."""

    @abstractmethod
    def predictions(self, examples: Examples, features: Features, outputs: Outputs) -> Iterator[Prediction]:
        """Yield the prediction for each example, as `bertfast predict` prints it."""

    @abstractmethod
    def compute_metrics(self, examples: Examples, features: Features, outputs: Outputs) -> dict[str, float]:
        """Compute the metrics; empty if the examples have no labels."""

    @abstractmethod
    def write_predictions(
        self, folder: Path, split: str, examples: Examples, features: Features, outputs: Outputs
    ) -> None:
        """Write predictions into `folder`, in the benchmark's submission format if it has one."""

    @abstractmethod
    def parse_lines(self, lines: Sequence[str]) -> Examples:
        """Return examples from lines of standard input."""

    def confusion_matrix(self, examples: Examples, features: Features, outputs: Outputs) -> ConfusionMatrix | None:
        """Return the confusion matrix; None if the task has none or the examples have no labels."""
        return None


def label_names(config: BertConfig) -> list[str]:
    """Return the names of a model's labels, by id."""
    names = {int(i): name for i, name in (config.id2label or {}).items()}
    return [names[i] for i in range(len(names))]


def label_to_id(config: BertConfig) -> dict[str, int]:
    """Return the id of each label by its name; labels without names (LABEL_3) are also found as "3"."""
    names = label_names(config)
    unnamed = {str(i): i for i, name in enumerate(names) if name == f"LABEL_{i}"}
    return unnamed | {name: i for i, name in enumerate(names)}


def write_rows(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a .tsv file."""
    lines = ["\t".join(header), *("\t".join(map(str, row)) for row in rows)]
    write_atomically(path, "\n".join(lines) + "\n")


def json_lines(lines: Sequence[str], example: str) -> list[dict[str, Any]]:
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
