"""The interface of a task (reading, featurising, loss, metrics, predictions), and the settings that all tasks share."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

from bertfast.runtime.precision import Precision
from bertfast.tasks.features import Features, ModelInputs
from bertfast.tasks.tables import BadRows, OnBadRows

Outputs = Sequence[np.ndarray]
"""Logits of each example: float32 [labels], or [tokens, labels] if each token has its own."""
ConfusionMatrix = tuple[list[str], np.ndarray]
"""Names of the labels, and int64 [labels, labels]: examples by true label (row) and predicted label (column)."""


@dataclass(kw_only=True)
class TaskSettings:
    """Settings that all commands on labelled data share.

    Attributes:
        model_name_or_path: Folder or hub id of a model and its tokenizer.
        task: sequence-classification, regression or multi-label (of texts or pairs of texts), multiple-choice,
            question-answering, token-classification, or the name of a data set of GLUE, SWAG, SQuAD or CoNLL;
            auto: inferred from the model, else from the file.
        text_column: Column of the text; none: the task's, else sentence, sentence1 or text.
        text_pair_column: Column of the second text of a pair; none: the task's, else sentence2 if there is one.
        label_column: Column of the label; none: the task's, else label.
        tag_column: Column of a word's tag in token-classification files, counted from 0; -1 is the last.
        max_seq_length: Maximum tokens per sequence; longer inputs are truncated or split. None: the model's positions.
        doc_stride: Tokens between the starts of two windows of a long context in question answering.
        max_query_length: Maximum tokens of a question.
        max_answer_length: Maximum tokens of an answer.
        null_score_diff_threshold: Predict no answer if its score exceeds the best answer's by more than this.
        n_best: Answers per question in nbest_SPLIT.json.
        on_bad_rows: Stop at the first row that cannot be used, or skip and count such rows.
        eval_tokens: Approximate tokens per batch in evaluation and prediction.
        cuda_graph: On a GPU, pad batches to a few shapes and replay frequent ones from CUDA graphs.
        precision: auto: bf16 if the device supports it natively and, on a CPU, it is faster; else fp32.
        device: cpu, cuda, cuda:1, …; none: a GPU if one is available.
    """

    model_name_or_path: str
    task: str = "auto"
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    tag_column: int = -1
    max_seq_length: int | None = None
    doc_stride: int = 128
    max_query_length: int = 64
    max_answer_length: int = 30
    null_score_diff_threshold: float = 0.0
    n_best: int = 20
    on_bad_rows: OnBadRows = "stop"
    eval_tokens: int = 8192
    cuda_graph: bool = True
    precision: Precision = "auto"
    device: str | None = None

    def __post_init__(self):
        require_positive(self, "eval_tokens", "doc_stride", "max_query_length", "max_answer_length", "n_best")


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
        self.settings, self.bad_rows = settings, BadRows(settings.on_bad_rows)
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


def require_positive(settings: Any, *names: str) -> None:
    """Raise ValueError, naming the flag, unless each of the named settings is at least 1."""
    for name in names:
        value = getattr(settings, name)
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


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
