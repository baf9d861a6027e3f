"""Multiple choice: which of several endings continues a text, as in SWAG (Zellers et al., 2018) and CODAH."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from bertfast.encoder import multiple_choice_loss, sequence_logits
from bertfast.models.bert import BertForMultipleChoice
from bertfast.runtime.settings import counted
from bertfast.tasks.features import Features, ModelInputs, tokenize
from bertfast.tasks.labels import canonical
from bertfast.tasks.metrics import classification_metrics
from bertfast.tasks.rows import Rows
from bertfast.tasks.sequence_classification import softmax
from bertfast.tasks.tables import Table, not_text, read_chunks, read_table
from bertfast.tasks.task import ROWS_PER_CHUNK, Outputs, Prediction, Task, json_lines, usable_labels, write_aligned

_LABEL = "label"
CHOICE_COLUMNS = "sent1, optionally sent2, endings (in tables ending0, ending1, …) and label"
"""The columns that multiple choice needs, for messages."""
_LINE_EXAMPLE = '{"sent1": "…", "sent2": "…", "endings": ["…", "…"]}'


@dataclass(frozen=True, eq=False)
class MultipleChoiceExamples:
    """Texts and their candidate endings.

    Attributes:
        texts: The first text of each example.
        endings: Candidate endings of each example, the same number for all.
        rows: The rows that they come from.
        labels: Index of the correct ending of each example; None: unknown.
    """

    texts: list[str]
    endings: list[list[str]]
    rows: Rows
    labels: list[int] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Sequence[int]) -> MultipleChoiceExamples:
        """Return the examples at `indices`."""
        texts, endings = [self.texts[i] for i in indices], [self.endings[i] for i in indices]
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return MultipleChoiceExamples(texts, endings, self.rows.select(indices), labels)


class MultipleChoiceTask(Task[MultipleChoiceExamples]):
    """Multiple choice: one score for each pair of the text and an ending."""

    model_class = BertForMultipleChoice
    metrics = ("accuracy", "loss")
    has_probabilities = True

    def read(self, path: str, *, labelled: bool) -> MultipleChoiceExamples:
        """Read a table with columns sent1, sent2 (optional; endings are appended to it), label and either ending0,
        ending1, … or, in JSON, a list endings."""
        table = read_table(path, bad=self.bad_rows)
        if labelled and "sent1" in table.columns:
            table.column(_LABEL)  # raises, naming the columns of the file, before the rows without labels are reported
        examples, table = _usable(table)
        if not labelled and _LABEL not in table.columns:
            return examples
        fields = zip(table.column(_LABEL), map(len, examples.endings), strict=True)
        found = usable_labels(fields, _choice, examples.rows, labelled=labelled)
        if found is None:
            return examples
        labels, usable = found
        if not usable:
            raise ValueError(f"{path} has no usable rows")
        return replace(examples.select(usable), labels=labels)

    def read_chunks(self, path: str) -> Iterator[MultipleChoiceExamples]:
        """Yield the examples of a file in parts; see `Task.read_chunks`."""
        return (_usable(table)[0] for table in read_chunks(path, ROWS_PER_CHUNK, bad=self.bad_rows))

    def featurize(
        self, examples: MultipleChoiceExamples, tokenizer: Tokenizer, max_length: int
    ) -> tuple[MultipleChoiceExamples, Features]:
        """Tokenize each pair of the text and an ending."""
        rows = zip(examples.texts, examples.endings, strict=True)
        pairs = [(text, ending) for text, endings in rows for ending in endings]
        labels = {} if examples.labels is None else {"labels": np.array(examples.labels, np.int64)}
        features = tokenize(tokenizer, pairs, max_length)
        return examples, replace(features, labels=labels, num_choices=len(examples.endings[0]))

    def logits(self, model: PreTrainedModel, inputs: ModelInputs) -> Tensor:
        """Compute logits [E, choices]."""
        return sequence_logits(model, inputs.packed(model)).view(-1, inputs.num_choices)

    def loss(self, model: PreTrainedModel, inputs: ModelInputs, items: Tensor) -> Tensor:
        """Compute the cross-entropy over each example's choices."""
        labels = inputs.arguments["labels"]
        return multiple_choice_loss(model, inputs.packed(model), labels, items, num_choices=inputs.num_choices)

    def texts(self, examples: MultipleChoiceExamples) -> Iterator[dict[str, Any]]:
        """Yield {"text", "endings"}."""
        for text, endings in zip(examples.texts, examples.endings, strict=True):
            yield {"text": text, "endings": endings}

    def predictions(
        self, examples: MultipleChoiceExamples, features: Features, outputs: Outputs
    ) -> Iterator[Prediction]:
        """Yield {"choice", "ending", "score"}: the index, its ending and its probability."""
        for endings, logits in zip(examples.endings, outputs, strict=True):
            choice = int(logits.argmax())
            yield {"choice": choice, "ending": endings[choice], "score": float(softmax(logits)[choice])}

    def probabilities(self, examples: MultipleChoiceExamples, outputs: Outputs) -> Iterator[list[float]]:
        """Yield the probability of each choice."""
        return (softmax(logits).tolist() for logits in outputs)

    def compute_metrics(
        self, examples: MultipleChoiceExamples, features: Features, outputs: Outputs
    ) -> dict[str, float]:
        """Compute accuracy and loss."""
        if examples.labels is None:
            return {}
        values = classification_metrics(np.stack(outputs), features.labels["labels"])
        return {name: values[name] for name in self.metrics}

    def write_predictions(
        self, folder: Path, split: str, examples: MultipleChoiceExamples, features: Features, outputs: Outputs
    ) -> None:
        """Write predictions_SPLIT.tsv: row, prediction and the probability of each choice."""
        header = ["prediction", *(f"ending{i}" for i in range(features.num_choices))]
        values = ([int(logits.argmax()), *(f"{score:.6g}" for score in softmax(logits))] for logits in outputs)
        write_aligned(folder / f"predictions_{split}.tsv", examples.rows, header, values)

    def parse_lines(self, lines: Sequence[str], first_row: int = 1) -> MultipleChoiceExamples:
        """Parse one JSON object per line."""
        required = (("sent1", str), ("endings", list))
        objects, rows = json_lines(lines, first_row, _LINE_EXAMPLE, self.bad_rows, self.known_ids, *required)
        columns = {name: [row.get(name) for row in objects] for name in ("sent1", "sent2", "endings")}
        return _usable(Table(columns, rows))[0]


def _usable(table: Table) -> tuple[MultipleChoiceExamples, Table]:
    """Return the examples of a table, without labels, and the rows that they come from."""
    if "sent1" not in table.columns or not any(re.fullmatch(r"endings|ending\d+", name) for name in table.columns):
        found = ", ".join(map(repr, table.columns))
        remedy = f"; rename those of {found}" if found else ", and its objects are empty"
        raise ValueError(f"{table.path}: multiple choice needs the columns {CHOICE_COLUMNS}{remedy}")
    table = table.with_texts("sent1")
    second_texts, choices = table.columns.get("sent2", [""] * len(table)), _endings(table)
    usable: list[int] = []
    joined: list[list[str]] = []
    for row, (second, endings) in enumerate(zip(second_texts, choices, strict=True)):
        problem = _problem(second, endings, len(joined[0]) if joined else None)
        if problem is None:
            usable.append(row)
            joined.append([" ".join(filter(None, (second, ending))) for ending in endings])
        else:
            table.rows.reject(row, problem)
    table = table.select(usable)
    return MultipleChoiceExamples(table.column("sent1"), joined, table.rows), table


def _problem(second_text: Any, endings: Any, count: int | None) -> str | None:
    """Return why a row cannot be used; None: it can.

    Args:
        second_text: The second text, if there is one.
        endings: The endings.
        count: Number of endings of the first row; None: this is the first.
    """
    if second_text is not None and not isinstance(second_text, str):
        return f"column 'sent2' {not_text(second_text)}"
    if not isinstance(endings, list) or not all(isinstance(ending, str) for ending in endings):
        found = "null or missing" if endings is None else json.dumps(endings, ensure_ascii=False)
        return f"the endings are {found}, not a list of texts"
    if len(endings) < 2 or count not in (None, len(endings)):
        first = "" if count is None else f" where the first row has {count}"
        return f"{counted(len(endings), 'ending')}{first}; at least two are needed, as many in each row"
    return None


def _endings(table: Table) -> list[Any]:
    """Return the endings of each row, from the column `endings` or from the columns ending0, ending1, …"""
    if "endings" in table.columns:
        return table.column("endings")
    names = sorted((name for name in table.columns if re.fullmatch(r"ending\d+", name)), key=lambda name: int(name[6:]))
    for i in range(max(len(names), 1)):
        table.column(f"ending{i}")  # raises, naming the columns of the file, if they are not numbered from 0
    return [list(row) for row in zip(*(table.column(name) for name in names), strict=True)]


def _choice(field: tuple[Any, int]) -> int:
    """Return the label in a field, given with the number of endings; ValueError if it is none of them."""
    value, count = field
    label = canonical(str(value).strip())
    if not (label.isdecimal() and len(label) < 10 and int(label) < count):
        raise ValueError(f"the label {value!r:.60} is not in 0 to {count - 1}")
    return int(label)
