"""What each kind of task brings to fine-tuning, evaluation and prediction, and the settings that they share."""

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
"""Of each example, what its model's head gives: float32 [labels], or [tokens, labels] where each token has its own."""
Confusion = tuple[list[str], np.ndarray]
"""Names of the labels, and int64 [labels, labels]: how often the row's was taken for the column's."""


@dataclass(kw_only=True)
class TaskSettings:
    """What all commands on labelled data have in common.

    Attributes:
        model_name_or_path: Folder or hub id of a model and its tokenizer.
        task: auto: what the file looks like; classification, regression or multi-label of texts or pairs; choices;
            answers to questions; tags of words; or a task of GLUE, SWAG, SQuAD or CoNLL by its name.
        text_column: Column of the text; none: the task's, else sentence, sentence1 or text.
        text_pair_column: Column of the second text of a pair; none: the task's, else sentence2, if it is there.
        label_column: Column of the label; none: the task's, else label.
        tag_column: Column of a word's tag in lines of words, from 0; the last is -1.
        max_seq_length: Tokens of a sequence at most, longer ones are cut or read in parts; none: the model's positions.
        doc_stride: Tokens from one part of a long text that is asked about to the next.
        max_query_length: Tokens of a question at most.
        max_answer_length: Tokens of an answer at most.
        null_score_diff_threshold: A question is left unanswered if that scores higher than the best answer by this.
        n_best: Answers that are written down for each question.
        on_bad_rows: What to do with rows that cannot be used.
        eval_tokens: About how many tokens to compute at a time when nothing is learned.
        cuda_graph: On a GPU, fill batches up to few shapes and replay those that come often from CUDA graphs.
        precision: auto takes bf16 where the device multiplies it natively (and, on a CPU, faster), else fp32.
        device: cpu, cuda, cuda:1, …; none: a GPU if there is one.
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
        for name in ("eval_tokens", "doc_stride", "max_query_length", "max_answer_length", "n_best"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")


class Task(ABC):
    """A kind of task: from files to features, and from a model's outputs to answers and measures.

    Examples are whatever `read` returns, with a length. Where a model is fine-tuned, `learn_labels` comes after the
    training file is read; where one exists already, `know` tells the labels it was trained with.
    """

    model: type[PreTrainedModel]
    of_features: ClassVar[type[PreTrainedModel] | None] = None  # the same on an encoder that does not learn
    head: ClassVar[str]  # begins the names of the weights without which answers mean nothing
    metrics: tuple[str, ...]  # names of measures, the one that decides first; "loss" among them falls

    def __init__(self, settings: TaskSettings):
        self.settings, self.bad = settings, BadRows(settings.on_bad_rows)
        self.config: BertConfig | None = None

    @abstractmethod
    def read(self, path: str, *, labelled: bool) -> Any:
        """The examples of a file. Without `labelled` labels may be missing, and what there are is kept."""

    def learn_labels(self, examples: Any) -> dict[str, Any]:
        """What the training examples say of a model's configuration: how many labels there are, and their names."""
        return {}

    def know(self, config: BertConfig) -> None:
        """Take labels from a model's configuration."""
        self.config = config

    @abstractmethod
    def featurize(self, examples: Any, tokenizer: Tokenizer, max_length: int) -> tuple[Any, Features]:
        """The features of examples, with labels if they have some; and the examples, less what cannot be used."""

    @abstractmethod
    def logits(self, model: PreTrainedModel, inputs: ModelInputs) -> Tensor:
        """Compute what answers are made of: [E, labels], or [1, T, labels] where each token has its own."""

    @abstractmethod
    def loss(self, model: PreTrainedModel, inputs: ModelInputs, items: Tensor) -> Tensor:
        """Compute a batch's part of its step's mean loss, which runs over `items` labels."""

    @abstractmethod
    def answers(self, examples: Any, features: Features, outputs: Outputs) -> Iterator[dict]:
        """What the model says of each example, as `bertfast predict` prints it."""

    @abstractmethod
    def measure(self, examples: Any, features: Features, outputs: Outputs) -> dict[str, float]:
        """The metrics; nothing where the examples have no labels."""

    @abstractmethod
    def write(self, folder: Path, split: str, examples: Any, features: Features, outputs: Outputs) -> None:
        """Write predictions into `folder`, in the form that the benchmark wants where it has one."""

    @abstractmethod
    def parse(self, lines: Sequence[str]) -> Any:
        """Examples from lines of standard input."""

    def confusion(self, examples: Any, features: Features, outputs: Outputs) -> Confusion | None:
        """Which labels are taken for which; None where that says nothing."""
        return None


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_rows(path: Path, header: Iterable[str], rows: Iterable[Iterable]) -> None:
    """Write a .tsv file."""
    lines = ["\t".join(header), *("\t".join(map(str, row)) for row in rows)]
    write_whole(path, "\n".join(lines) + "\n")


def json_lines(lines: Sequence[str], wanted: str) -> list[dict]:
    """Objects of lines from standard input, such as `wanted`."""
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            raise ValueError(f"line {number} of standard input is not an object such as {wanted}")
        objects.append(value)
    return objects
