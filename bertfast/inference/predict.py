"""`bertfast predict`: the answers of a fine-tuned model, from a file or line by line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from bertfast.models.files import read_config, resolve
from bertfast.runtime.cuda_graph import GraphRunner, capture_for, side_stream
from bertfast.runtime.precision import autocast, choose_device, choose_precision
from bertfast.tasks.features import Features, ModelInputs, batches_by_length
from bertfast.tasks.pretrained import open_model, sequence_length
from bertfast.tasks.registry import choose_task
from bertfast.tasks.task import Outputs, Task, TaskSettings

_LINES_AT_A_TIME = 1000


@dataclass(kw_only=True)
class PredictSettings(TaskSettings):
    """What to predict, and with which model.

    Attributes:
        test_file: A file as in fine-tuning; none: standard input, where a line is a text, two with a tab between, the
            words of a sentence, or a JSON object with a question or choices.
    """

    test_file: str | None = None


def predict(settings: PredictSettings) -> None:
    """Print a JSON object for each text, sentence, question or row, with the answer and its probability."""
    task, model, tokenizer = open_tuned(settings)
    length = sequence_length(settings.max_seq_length, model.config)
    parts = _from_lines(task) if settings.test_file is None else [task.read(settings.test_file, labelled=False)]
    for examples in parts:
        examples, features = task.featurize(examples, tokenizer, length)
        outputs = predict_outputs(task, model, features)
        for answer in task.answers(examples, features, outputs):
            print(json.dumps(answer, ensure_ascii=False))
        sys.stdout.flush()


def open_tuned(settings: TaskSettings) -> tuple[Task, PreTrainedModel, Tokenizer]:
    """The task that a model was fine-tuned for, the model on its device, and its tokenizer."""
    config = read_config(resolve(settings.model_name_or_path))
    task = choose_task(settings, config=config)
    model, tokenizer = open_model(task.model, settings.model_name_or_path, task.head)
    task.know(model.config)
    return task, model.to(choose_device(settings.device)), tokenizer


@torch.no_grad()
def predict_outputs(task: Task, model: PreTrainedModel, features: Features) -> Outputs:
    """What the head gives for each example, fp32, without dropout; as many tokens at a time as the settings say."""
    training, precision = model.training, choose_precision(model.device, task.settings.precision)
    model.eval()
    outputs: list[Any] = [None] * len(features)

    def forward(inputs: ModelInputs) -> Tensor:
        with autocast(model.device, precision):
            return task.logits(model, inputs).float()

    capture = capture_for(model, precision, enabled=task.settings.cuda_graph)
    runner = GraphRunner(forward, model.device, capture)
    with side_stream(model.device):
        for rows in batches_by_length(features, task.settings.eval_tokens):
            inputs = features.model_inputs(rows, labels=False, bucketed=capture is not None)
            logits = runner(inputs).clone().cpu().numpy()  # a replay overwrites what the last one returned
            parts = features.parts(rows, logits[0]) if logits.ndim == 3 else logits[: len(rows)]
            for row, part in zip(rows, parts, strict=True):
                outputs[row] = part
    model.train(training)
    return outputs


def _from_lines(task: Task) -> Iterator[Any]:
    some = 1 if sys.stdin.isatty() else _LINES_AT_A_TIME  # at a terminal each line is answered when it comes
    while lines := [line.rstrip("\r\n") for line in islice(sys.stdin, some)]:
        yield task.parse(lines)
