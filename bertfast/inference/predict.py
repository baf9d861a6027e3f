"""`bertfast predict`: predictions of a fine-tuned model for a file or for lines of standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from bertfast.data.text_files import STANDARD_INPUT, is_standard_input, read_arriving_lines, require_input
from bertfast.inference.frozen import examples_to_begin, freeze_on_cpu, require_own_precision, uncaptured_buckets
from bertfast.inference.text_rows import no_texts
from bertfast.models.files import read_config, resolve
from bertfast.models.quantised_config import is_quantised
from bertfast.models.sentence_folder import encoder_folder
from bertfast.runtime.cuda_graph import CapturableModel, GraphRunner, capture_for, side_stream
from bertfast.runtime.precision import autocast, choose_device, choose_precision, require_finite
from bertfast.runtime.settings import Count, refuse_without_effect
from bertfast.tasks.features import BUCKETED, CutTexts, Features, ModelInputs, batches_by_length
from bertfast.tasks.pretrained import MissingHeadError, open_model
from bertfast.tasks.registry import choose_task
from bertfast.tasks.rows import Skipped
from bertfast.tasks.settings import ColumnSettings, QuestionAnsweringSettings, TaskSettings
from bertfast.tasks.task import ROWS_PER_CHUNK, HasRows, Outputs, Prediction, Task


@dataclass(frozen=True, kw_only=True)
class InputColumnSettings(ColumnSettings):
    """Columns of the input file, and rows that cannot be used."""

    unused = ("label_column",)


@dataclass(frozen=True, kw_only=True)
class AnswerSettings(QuestionAnsweringSettings):
    """Windows of long contexts, and choice of the answers, in question answering."""

    unused = ("n_best",)


@dataclass(frozen=True, kw_only=True)
class PredictSettings(TaskSettings):
    """Input and model of `bertfast predict`.

    Attributes:
        input_file: A file as for fine-tuning. If not given, or "-": standard input, where each line is a text, a pair
            of texts separated by a tab, a sentence of words separated by spaces, or a JSON object with a question or
            with choices.
        echo_texts: Also print the texts of each row.
        all_probabilities: Also print the probabilities of all labels: of each text, word or choice.
        batch_size: Maximum texts per batch. If not given: as many as --eval-tokens allow.
    """

    unused = ("embedding",)

    input_file: str | None = None
    echo_texts: bool = False
    all_probabilities: bool = False
    batch_size: Count | None = None
    columns: InputColumnSettings = field(default_factory=InputColumnSettings)
    question_answering: AnswerSettings = field(default_factory=AnswerSettings)


def predict(settings: PredictSettings) -> None:
    """Print one JSON object per row of the input: its number from 1, its id if it has one, and the prediction.

    A row that is skipped is printed as {"row": …, "skipped": why}. Lines of standard input are answered when they have
    arrived, in batches if they arrive fast.

    Raises:
        ValueError: There is no row, or one cannot be used.
    """
    file = "-" if settings.input_file is None else settings.input_file
    require_input(file)
    task, model, tokenizer = open_finetuned(settings)
    require_own_precision(model, settings.compute.precision)
    if settings.all_probabilities and not task.has_probabilities:
        refuse_without_effect(["--all-probabilities"], "the task of the model has no labels with probabilities")
    length = task.max_length()
    cut = CutTexts(STANDARD_INPUT if is_standard_input(file) else file, length)
    is_empty = True
    with task.bad_rows.logged():
        if is_standard_input(file):
            parts = _from_lines(task, examples_to_begin(model, settings.compute.precision))
        else:
            parts = task.read_chunks(file)
        for examples in parts:
            for prediction in _predict_rows(task, model, tokenizer, cut, examples, settings):
                is_empty = False
                print(json.dumps(prediction, ensure_ascii=False))
            sys.stdout.flush()
    if is_empty:
        raise no_texts(file)
    cut.report()


def _predict_rows(
    task: Task[Any],
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    cut: CutTexts,
    examples: HasRows,
    settings: PredictSettings,
) -> Iterator[Prediction]:
    """Yield a JSON object for each row of the examples and each row skipped on the way, in order; count cut texts."""
    predictions: Iterable[Prediction] = ()
    if len(examples):
        examples, features = task.featurize(examples, tokenizer, cut.length)
        cut.add(features)
        precision = task.settings.compute.precision
        freeze_on_cpu(model, precision, features, lambda inputs: task.logits(model, inputs))
        outputs = predict_outputs(task, model, features, settings.batch_size)
        predictions = task.predictions(examples, features, outputs)
        if settings.all_probabilities:
            of_all = task.probabilities(examples, outputs)
            predictions = (one | {"probabilities": every} for one, every in zip(predictions, of_all, strict=True))
        if settings.echo_texts:
            predictions = (texts | one for texts, one in zip(task.texts(examples), predictions, strict=True))
    for row, row_id, value in examples.rows.aligned(predictions):
        numbered: Prediction = {"row": row} | ({} if row_id is None else {"id": row_id})
        yield numbered | ({"skipped": value.problem} if isinstance(value, Skipped) else value)
    task.bad_rows.log_skipped()
    task.bad_rows.skipped.clear()


def open_finetuned(settings: TaskSettings) -> tuple[Task[Any], PreTrainedModel, Tokenizer]:
    """Return the task that a model was fine-tuned for, the model on its device, and its tokenizer."""
    name, compute = settings.model_name_or_path, settings.compute
    folder = resolve(name)
    config = read_config(encoder_folder(folder))
    task = choose_task(settings, config=config)
    if (encoder := task.open_folder(folder)) != folder:
        name = str(encoder)
    device = choose_device(compute.device)
    try:
        model, tokenizer = open_model(task.model_class, name, True, device, compute.precision)
    except MissingHeadError as error:
        it = "the model from which it was quantised" if is_quantised(config) else "it"
        raise MissingHeadError(
            f"{error}: fine-tune {it} with `bertfast finetune`, or measure a pre-trained model on text with "
            "`bertfast evaluate --objective mlm`" + (", which do not take int8 weights" if is_quantised(config) else "")
        ) from None
    task.set_config(config)
    return task, model, tokenizer


@torch.no_grad()
def predict_outputs(
    task: Task[Any], model: PreTrainedModel, features: Features, batch_size: int | None = None
) -> Outputs:
    """Compute the fp32 logits of each example, without dropout.

    Args:
        task: Task of the model.
        model: The model.
        features: Tokenized examples.
        batch_size: Maximum examples per batch; None: only --eval-tokens limits it.
    """
    training = model.training
    precision = choose_precision(model.device, task.settings.compute.precision, model.config)
    model.train(False)
    features, of_examples = task.without_repetitions(features)
    outputs: list[Any] = [None] * len(features)

    def forward(inputs: ModelInputs) -> Tensor:
        with autocast(model.device, precision):
            return task.logits(model, inputs).float()

    enabled = task.settings.compute.cuda_graph and task.captures
    capture = capture_for(cast(CapturableModel, model), precision, enabled=enabled)
    runner = GraphRunner(forward, model.device, capture)
    buckets = (
        uncaptured_buckets(model, precision, logits_per_token=task.logits_per_token) if capture is None else BUCKETED
    )
    with side_stream(model.device):
        tokens = task.settings.compute.tokens_per_batch(model.device)
        for rows in batches_by_length(features, tokens, batch_size):
            inputs = features.model_inputs(rows, labels=False, buckets=buckets)
            logits = runner(inputs).clone().cpu()  # the next replay overwrites the runner's result
            # Logits per token, [1, T, labels], are split by example; logits per example lose their padding.
            used = logits[0, : features.lengths[rows].sum()] if logits.ndim == 3 else logits[: len(rows)]
            require_finite(used, model.name_or_path)
            parts = features.split_by_example(rows, used.numpy()) if logits.ndim == 3 else used.numpy()
            for row, part in zip(rows, parts, strict=True):
                outputs[row] = part
    model.train(training)
    return of_examples(outputs)


def _from_lines(task: Task[Any], least: int) -> Iterator[Any]:
    for lines in read_arriving_lines(ROWS_PER_CHUNK, least):
        yield task.parse_lines([line.rstrip("\r\n") for _, line in lines], lines[0][0])


def require_finite_outputs(task: Task[Any], model: PreTrainedModel, features: Features) -> None:
    """Raise NotFiniteError if a model's outputs for the first few examples are not finite."""
    precision, training = choose_precision(model.device, task.settings.compute.precision, model.config), model.training
    inputs = features.model_inputs(np.arange(min(8, len(features))), labels=False).to(model.device)
    model.train(False)
    with torch.no_grad(), autocast(model.device, precision):
        outputs = task.logits(model, inputs)
    model.train(training)
    require_finite(outputs, model.name_or_path)
