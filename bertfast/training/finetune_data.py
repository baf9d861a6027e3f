"""The labelled data of a fine-tuning run, by split: train, validation and test."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
from transformers import BertConfig

from bertfast.tasks.features import CutTexts
from bertfast.tasks.pretrained import sequence_length
from bertfast.tasks.task import Task
from bertfast.training.finetune_settings import FinetuneSettings


def data_files(settings: FinetuneSettings) -> dict[str, str]:
    """Return the file of each split that the settings name."""
    files = {"train": settings.train_file, "validation": settings.validation_file, "test": settings.test_file}
    return {split: path for split, path in files.items() if path is not None}


def read_examples(settings: FinetuneSettings, task: Task[Any]) -> dict[str, Any]:
    """Return the examples of each split; those to test on need no labels."""
    return {split: task.read(path, labelled=split != "test") for split, path in data_files(settings).items()}


def featurize(
    settings: FinetuneSettings, task: Task[Any], examples: dict[str, Any], tokenizer: Tokenizer, config: BertConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tokenize the examples of each split; texts that are cut are counted in a warning.

    Args:
        settings: Settings of the run.
        task: Its task.
        examples: What `read_examples` has returned.
        tokenizer: The model's tokenizer.
        config: The model's configuration.

    Returns:
        The examples that have features, and their features.
    """
    length, files = sequence_length(settings.max_seq_length, config), data_files(settings)
    kept, features = {}, {}
    for split, read in examples.items():
        kept[split], features[split] = task.featurize(read, tokenizer, length)
        cut = CutTexts(files[split], length)
        cut.add(features[split])
        cut.report()
    return kept, features
