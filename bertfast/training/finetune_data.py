"""The labelled data of a fine-tuning run, by split: train, validation and test."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import BertConfig

from bertfast.models.files import resolve
from bertfast.runtime.settings import flag
from bertfast.tasks.features import Buckets, CutTexts, Features, ModelInputs, shuffled_batches, within_budget
from bertfast.tasks.pretrained import open_tokenizer
from bertfast.tasks.task import Task
from bertfast.training.distributed import Distributed
from bertfast.training.finetune_model import choose_metric, finetuning_task, model_config
from bertfast.training.finetune_settings import FinetuneSettings

# Settings that limit the examples of each split.
_LIMITS = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}


@dataclass(frozen=True)
class RunData:
    """What a run reads before it builds its model.

    Attributes:
        task: The task: reads files, computes losses and metrics.
        metric: Name of the metric that selects the best model.
        source: Folder of the model that is fine-tuned.
        config: Configuration of the model that is trained.
        tokenizer: Its tokenizer.
        examples, features: Examples of each split, and their token ids and labels.
    """

    task: Task[Any]
    metric: str
    source: Path
    config: BertConfig
    tokenizer: Tokenizer
    examples: dict[str, Any]
    features: dict[str, Any]

    @classmethod
    def open(cls, settings: FinetuneSettings) -> RunData:
        """Read the data of a run, and tokenize it.

        Raises:
            FileNotFoundError: There is no such model or file.
            ValueError: Settings, data and model do not fit together.
        """
        task = finetuning_task(settings)
        with task.bad_rows.logged():
            read = read_examples(settings, task)
            source = task.open_folder(resolve(settings.model_name_or_path))
            config = model_config(settings, source, task.label_config(read["train"]))
            task.set_config(config)
            metric = choose_metric(settings, task)
            tokenizer = open_tokenizer(source, config)
            examples, features = featurize(settings, task, read, tokenizer, metric)
        return cls(task, metric, source, config, tokenizer, examples, features)


def data_files(settings: FinetuneSettings) -> dict[str, str]:
    """Return the file of each split that the settings name."""
    files = {"train": settings.train_file, "validation": settings.validation_file, "test": settings.test_file}
    return {split: path for split, path in files.items() if path is not None}


def read_examples(settings: FinetuneSettings, task: Task[Any]) -> dict[str, Any]:
    """Return the examples of each split; those to test on need no labels."""
    return {split: task.read(path, labelled=split != "test") for split, path in data_files(settings).items()}


def featurize(
    settings: FinetuneSettings, task: Task[Any], examples: dict[str, Any], tokenizer: Tokenizer, metric: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tokenize the examples of each split, as many as `SampleSettings` allow; warn of texts that are cut.

    Args:
        settings: Settings of the run.
        task: Its task.
        examples: What `read_examples` has returned.
        tokenizer: The model's tokenizer.
        metric: Metric that selects the best model.

    Returns:
        The examples that have features, and their features.

    Raises:
        ValueError: The validation data leaves that metric undefined, or the loss of the training data is always 0.
    """
    length, files = task.max_length(), data_files(settings)
    kept, features = {}, {}
    limits = settings.samples.flat()
    cut_by: dict[str, str] = {}  # flags by split
    for split, read in examples.items():
        name = _LIMITS[split]
        if (limit := limits[name]) is not None and limit < len(read):
            read = read.select(range(limit))
            cut_by[split] = f"{flag(name)} {limit}"
            if split == "train" and (reason := task.untrainable(read)) is not None:
                raise ValueError(
                    f"{files[split]}: with {cut_by[split]}, {reason}: choose more samples, or leave the flag out"
                )
        kept[split], features[split] = task.featurize(read, tokenizer, length)
        cut = CutTexts(files[split], length)
        cut.add(features[split])
        cut.report()
    if "validation" in kept:
        reasons = task.unmeasurable(kept["validation"], features["validation"])
        if metric in reasons:
            others = [name for name in task.metrics if name not in reasons]
            remedies = ["choose more samples" if "validation" in cut_by else "give other validation data"]
            remedies += [f"choose {' or '.join(others)} by --metric-for-best-model"] * bool(others)
            cause = f"with {cut_by['validation']}, " if "validation" in cut_by else ""
            raise ValueError(
                f"{files['validation']}: {cause}{reasons[metric]}, so {metric} cannot be measured: "
                f"{', or '.join(remedies)}"
            )
    return kept, features


def batches_of_passes(
    features: Features, rows: np.ndarray, size: int, tokens: int, buckets: Buckets, distributed: Distributed
) -> list[list[ModelInputs]]:
    """Return the batches of each pass of a step that a rank does, which may be none.

    Args:
        features: Features of the training data.
        rows: Indices of the examples of the step.
        size: Examples per pass.
        tokens: Approximate tokens of a batch; a longer pass is divided.
        buckets: Which sizes of a batch are padded.
        distributed: Processes of the run, which do the passes in turn.
    """
    firsts = range(0, len(rows), size)[distributed.rank :: distributed.world_size]
    passes = (rows[first : first + size] for first in firsts)
    parts = (within_budget(features, one, tokens) for one in passes)
    return [[features.model_inputs(part, buckets=buckets) for part in of_pass] for of_pass in parts]


def rows_of_steps(examples: int, per_step: int, seed: int, step: int) -> Iterator[np.ndarray]:
    """Yield the example indices of each step, without end.

    Args:
        examples: Number of examples.
        per_step: Examples per step; the last one of an epoch may have less.
        seed: Seed of their order.
        step: Steps done.
    """
    epoch, done = divmod(step, math.ceil(examples / per_step))
    batches = chain.from_iterable(shuffled_batches(examples, per_step, seed, number) for number in count(epoch))
    return islice(batches, done, None)
