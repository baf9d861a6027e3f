"""`bertfast predict`: the answers of a fine-tuned model, from a file or line by line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from tokenizers import Tokenizer

from bertfast.config import BertConfig
from bertfast.models import BertForSequenceClassification
from bertfast.tasks.classification import Columns, Features, batches_by_length, featurize, is_regression, tokenize
from bertfast.tasks.pretrained import open_model, sequence_length
from bertfast.tasks.tables import read_table
from bertfast.training.precision import Precision, autocast, choose_device, choose_precision

_LINES_AT_A_TIME = 1000


@dataclass(kw_only=True)
class TaskSettings:
    """What all commands on sentences have in common.

    Attributes:
        model_name_or_path: Folder or hub id of a model and its tokenizer.
        text_column: Column of the text; none: sentence, sentence1 or text.
        text_pair_column: Column of the second text of a pair; none: sentence2, if it is there.
        max_seq_length: Tokens of a text or pair at most, longer ones are cut; none: the positions of the model.
        eval_tokens: About how many tokens to compute at a time when nothing is learned.
        precision: auto takes bf16 where the device multiplies it natively (and, on a CPU, faster), else fp32.
        device: cpu, cuda, cuda:1, …; none: a GPU if there is one.
    """

    model_name_or_path: str
    text_column: str | None = None
    text_pair_column: str | None = None
    max_seq_length: int | None = None
    eval_tokens: int = 8192
    precision: Precision = "auto"
    device: str | None = None

    def __post_init__(self):
        if self.eval_tokens < 1:
            raise ValueError(f"eval_tokens is at least 1, got {self.eval_tokens}")


@dataclass(kw_only=True)
class PredictSettings(TaskSettings):
    """What to predict, and with which model.

    Attributes:
        test_file: A .tsv or .jsonl file; none: standard input, a text a line, the two of a pair with a tab between.
    """

    test_file: str | None = None


def predict(settings: PredictSettings) -> None:
    """Print a JSON object for each text: {"label", "score"}, its probability; or {"score"} of a regression."""
    model, tokenizer = open_classifier(settings)
    length = sequence_length(settings.max_seq_length, model.config)
    if settings.test_file is None:
        parts = _from_lines(sys.stdin, tokenizer, length)
    else:
        table = read_table(settings.test_file)
        columns = Columns.choose(table, settings.text_column, settings.text_pair_column, None)
        parts = [featurize(table, columns, tokenizer, length)]
    for features in parts:
        logits = predict_logits(model, features, settings.eval_tokens, settings.precision)
        for answer in _answers(logits, model.config):
            print(json.dumps(answer, ensure_ascii=False))
        sys.stdout.flush()


def open_classifier(settings: TaskSettings) -> tuple[BertForSequenceClassification, Tokenizer]:
    """The fine-tuned model on its device, and its tokenizer."""
    model, tokenizer = open_model(BertForSequenceClassification, settings.model_name_or_path, "classifier.")
    return model.to(choose_device(settings.device)), tokenizer


@torch.no_grad()
def predict_logits(model: BertForSequenceClassification, features: Features, tokens: int, precision: str) -> np.ndarray:
    """The logits of every sequence, float32 [S, labels], computed without dropout, about `tokens` at a time."""
    training = model.training
    model.eval()
    logits = np.empty((len(features), model.config.num_labels), dtype=np.float32)
    for rows in batches_by_length(features, tokens):
        batch = features.batch(rows, model.device)
        batch.pop("labels", None)
        with autocast(model.device, choose_precision(model.device, precision)):
            logits[rows] = model(**batch).logits.float().cpu().numpy()
    model.train(training)
    return logits


def write_predictions(path: Path, logits: np.ndarray, config: BertConfig) -> None:
    """Write a .tsv with the columns index, prediction and, of a classifier, the probability of each label."""
    scores = [] if is_regression(config) else [config.id2label[i] for i in range(config.num_labels)]
    lines = ["\t".join(["index", "prediction", *scores])]
    for index, (answer, row) in enumerate(zip(_answers(logits, config), _probabilities(logits), strict=True)):
        prediction = answer["label"] if scores else f"{answer['score']:.6g}"
        lines.append("\t".join([str(index), prediction, *(f"{p:.6g}" for p in row[: len(scores)])]))
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _answers(logits: np.ndarray, config: BertConfig) -> Iterator[dict]:
    if is_regression(config):
        return ({"score": float(score)} for score in logits[:, 0])
    return ({"label": config.id2label[int(row.argmax())], "score": float(row.max())} for row in _probabilities(logits))


def _probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def _from_lines(lines: TextIO, tokenizer: Tokenizer, max_length: int) -> Iterator[Features]:
    some = 1 if lines.isatty() else _LINES_AT_A_TIME  # at a terminal each line is answered when it comes
    while texts := [line.rstrip("\r\n").split("\t", 1) for line in islice(lines, some)]:
        yield tokenize(tokenizer, [tuple(text) if len(text) == 2 else text[0] for text in texts], max_length)
