"""A text and several ways in which it may go on, one of them right: SWAG (Zellers et al., 2018) and its like."""

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
from bertfast.tasks.metrics import CLASSIFICATION, measure_classes
from bertfast.tasks.sequence_classification import softmax
from bertfast.tasks.tables import Table, read_table
from bertfast.tasks.task import Outputs, Task, json_lines, write_rows

_WANTED = '{"sent1": "…", "sent2": "…", "endings": ["…", "…"]}'


@dataclass(frozen=True, eq=False)
class Choices:
    """Texts, the ways in which each may go on (equally many), and where it is known the number of the right one."""

    texts: list[str]
    endings: list[list[str]]
    labels: list[int] | None

    def __len__(self) -> int:
        return len(self.texts)


class ChoiceTask(Task):
    """Which of several endings is right: a score for each pair of the text and an ending."""

    model = BertForMultipleChoice
    head = "classifier."
    metrics = tuple(name for name in CLASSIFICATION if name in ("accuracy", "loss"))

    def read(self, path: str, *, labelled: bool) -> Choices:
        """A table with sent1, perhaps sent2, with which endings begin, label, and ending0 and so on; or JSONL with a
        list of endings."""
        table = read_table(path, bad=self.bad)
        first, second = table.texts("sent1"), table.columns.get("sent2", [""] * len(table))
        endings, label = _endings(table), table.columns.get("label") if not labelled else table.column("label")
        texts, kept, labels = [], [], []
        for row in range(len(table)):
            count = len(endings[row])
            problem = None
            if count < 2 or count != len(endings[0]):
                problem = f"{count} endings where the first row has {len(endings[0])}; there must be two at least"
            elif label is not None and not (str(label[row]).isdecimal() and int(label[row]) < count):
                problem = f"the label {label[row]!r} is none of 0 to {count - 1}"
            if problem is not None:
                self.bad.add(f"{table.where(row)}: {problem}")
                continue
            texts.append(first[row])
            kept.append([" ".join(filter(None, (second[row], ending))) for ending in endings[row]])
            labels.append(label is not None and int(label[row]))
        if not texts:
            raise ValueError(f"{path} holds no row that can be used")
        return Choices(texts, kept, labels if label is not None else None)

    def featurize(self, examples: Choices, tokenizer: Tokenizer, max_length: int) -> tuple[Choices, Features]:
        """A pair of the text and each ending."""
        rows = zip(examples.texts, examples.endings, strict=True)
        pairs = [(text, ending) for text, endings in rows for ending in endings]
        labels = {} if examples.labels is None else {"labels": np.array(examples.labels, np.int64)}
        features = tokenize(tokenizer, pairs, max_length)
        return examples, replace(features, labels=labels, choices=len(examples.endings[0]))

    def logits(self, model: PreTrainedModel, inputs: ModelInputs) -> Tensor:
        """[E, choices]."""
        return sequence_logits(model, inputs.packed(model)).view(-1, inputs.arguments["num_choices"])

    def loss(self, model: PreTrainedModel, inputs: ModelInputs, items: Tensor) -> Tensor:
        """Cross entropy between an example's choices."""
        labels, choices = inputs.arguments["labels"], inputs.arguments["num_choices"]
        return multiple_choice_loss(model, inputs.packed(model), labels, items, num_choices=choices)

    def answers(self, examples: Choices, features: Features, outputs: Outputs) -> Iterator[dict]:
        """{"choice", "ending", "score"}, its probability."""
        for endings, logits in zip(examples.endings, outputs, strict=True):
            choice = int(logits.argmax())
            yield {"choice": choice, "ending": endings[choice], "score": float(softmax(logits)[choice])}

    def measure(self, examples: Choices, features: Features, outputs: Outputs) -> dict[str, float]:
        """Accuracy and loss."""
        if examples.labels is None:
            return {}
        measured = measure_classes(np.stack(outputs), features.labels["labels"])
        return {name: measured[name] for name in self.metrics}

    def write(self, folder: Path, split: str, examples: Choices, features: Features, outputs: Outputs) -> None:
        """predictions_SPLIT.tsv: index, prediction and the probability of each choice."""
        header = ["index", "prediction", *(f"ending{i}" for i in range(features.choices))]
        rows = (
            [index, int(logits.argmax()), *(f"{score:.6g}" for score in softmax(logits))]
            for index, logits in enumerate(outputs)
        )
        write_rows(folder / f"predictions_{split}.tsv", header, rows)

    def parse(self, lines: Sequence[str]) -> Choices:
        """A JSON object a line."""
        rows = json_lines(lines, _WANTED)
        if not all(isinstance(row.get("sent1"), str) and isinstance(row.get("endings"), list) for row in rows):
            raise ValueError(f"each line of standard input must be an object such as {_WANTED}")
        endings = [[" ".join(filter(None, (row.get("sent2"), end))) for end in row["endings"]] for row in rows]
        if len(set(map(len, endings))) != 1:
            raise ValueError("all lines of standard input must have equally many endings")
        return Choices([row["sent1"] for row in rows], endings, None)


def _endings(table: Table) -> list[list[str]]:
    if "endings" in table.columns:
        return table.column("endings")
    names = sorted((name for name in table.columns if re.fullmatch(r"ending\d+", name)), key=lambda name: int(name[6:]))
    if not names:
        table.column("ending0")  # raises, naming the columns that are there
    return [list(row) for row in zip(*(table.column(name) for name in names), strict=True)]
