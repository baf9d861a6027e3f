"""Multiple choice: which of several endings continues a text, as in SWAG (Zellers et al., 2018) and CODAH."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from bertfast.encoder import multiple_choice_loss, sequence_logits
from bertfast.models.bert import BertForMultipleChoice
from bertfast.tasks.features import Features, ModelInputs, tokenize
from bertfast.tasks.metrics import classification_metrics
from bertfast.tasks.sequence_classification import softmax
from bertfast.tasks.tables import Table, read_table
from bertfast.tasks.task import Outputs, Prediction, Task, json_lines, write_rows

_LINE_EXAMPLE = '{"sent1": "…", "sent2": "…", "endings": ["…", "…"]}'


@dataclass(frozen=True, eq=False)
class MultipleChoiceExamples:
    """Texts and their candidate endings.

    Attributes:
        texts: The first text of each example.
        endings: Candidate endings of each example, the same number for all.
        labels: Index of the correct ending of each example; None: unknown.
    """

    texts: list[str]
    endings: list[list[str]]
    labels: list[int] | None

    def __len__(self) -> int:
        return len(self.texts)


class MultipleChoiceTask(Task[MultipleChoiceExamples]):
    """Multiple choice: one score for each pair of the text and an ending."""

    model_class = BertForMultipleChoice
    head_prefix = "classifier."
    metrics = ("accuracy", "loss")

    def read(self, path: str, *, labelled: bool) -> MultipleChoiceExamples:
        """Read a table with columns sent1, sent2 (optional; endings are appended to it), label and either ending0,
        ending1, … or, in JSONL, a list endings."""
        table = read_table(path, bad=self.bad_rows)
        first_texts, second_texts = table.texts("sent1"), table.columns.get("sent2", [""] * len(table))
        rows_of_endings = _endings(table)
        label_column = table.column("label") if labelled else table.columns.get("label")
        examples = MultipleChoiceExamples([], [], None if label_column is None else [])
        for row in range(len(table)):
            count = len(rows_of_endings[row])
            problem = None
            if count < 2 or count != len(rows_of_endings[0]):
                problem = f"{count} endings where the first row has {len(rows_of_endings[0])}; at least two are needed"
            elif label_column is not None:
                label = label_column[row]
                if not (str(label).isdecimal() and int(label) < count):
                    problem = f"the label {label!r} is not in 0 to {count - 1}"
            if problem is not None:
                self.bad_rows.add(f"{table.where(row)}: {problem}")
                continue
            examples.texts.append(first_texts[row])
            examples.endings.append(_joined(second_texts[row], rows_of_endings[row]))
            if examples.labels is not None and label_column is not None:
                examples.labels.append(int(label_column[row]))
        if not examples:
            raise ValueError(f"{path} has no usable rows")
        return examples

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

    def predictions(
        self, examples: MultipleChoiceExamples, features: Features, outputs: Outputs
    ) -> Iterator[Prediction]:
        """Yield {"choice", "ending", "score"}: the index, its ending and its probability."""
        for endings, logits in zip(examples.endings, outputs, strict=True):
            choice = int(logits.argmax())
            yield {"choice": choice, "ending": endings[choice], "score": float(softmax(logits)[choice])}

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
        """Write predictions_SPLIT.tsv: index, prediction and the probability of each choice."""
        header = ["index", "prediction", *(f"ending{i}" for i in range(features.num_choices))]
        rows = (
            [index, int(logits.argmax()), *(f"{score:.6g}" for score in softmax(logits))]
            for index, logits in enumerate(outputs)
        )
        write_rows(folder / f"predictions_{split}.tsv", header, rows)

    def parse_lines(self, lines: Sequence[str]) -> MultipleChoiceExamples:
        """Parse one JSON object per line."""
        rows = json_lines(lines, _LINE_EXAMPLE)
        if not all(isinstance(row.get("sent1"), str) and isinstance(row.get("endings"), list) for row in rows):
            raise ValueError(f"each line of standard input must be an object such as {_LINE_EXAMPLE}")
        endings = [_joined(row.get("sent2"), row["endings"]) for row in rows]
        if len(set(map(len, endings))) != 1:
            raise ValueError("all lines of standard input must have the same number of endings")
        return MultipleChoiceExamples([row["sent1"] for row in rows], endings, None)


def _joined(second_text: str | None, endings: list[str]) -> list[str]:
    """Return the second text, if there is one, followed by each ending."""
    return [" ".join(filter(None, (second_text, ending))) for ending in endings]


def _endings(table: Table) -> list[list[str]]:
    """Return the endings of each row, from the column `endings` or from the columns ending0, ending1, …"""
    if "endings" in table.columns:
        return table.column("endings")
    names = sorted((name for name in table.columns if re.fullmatch(r"ending\d+", name)), key=lambda name: int(name[6:]))
    if not names:
        table.column("ending0")  # raises, naming the columns of the file
    return [list(row) for row in zip(*(table.column(name) for name in names), strict=True)]
