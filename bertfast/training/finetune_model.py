"""The configuration of the model that fine-tuning trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import BertConfig

from bertfast.models.files import read_config
from bertfast.tasks.registry import FINETUNING_TASK
from bertfast.training.finetune_settings import FinetuneSettings


def model_config(settings: FinetuneSettings, source: Path, labels: dict[str, Any]) -> BertConfig:
    """Return the configuration of the model that a run trains.

    Args:
        settings: Settings of the run.
        source: Folder of the model to fine-tune.
        labels: Entries that follow from the task's labels.
    """
    names, known = labels.get("id2label"), read_config(source).id2label
    if names is not None and sorted((known or {}).values()) == sorted(names.values()):
        labels = labels | {"id2label": known}
    if (dropout := settings.model.dropout) is not None:
        labels |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    if settings.task != "auto":
        labels |= {FINETUNING_TASK: settings.task}
    if settings.model.bilstm:
        labels |= {"bilstm": True}
    if settings.feature_based.strategy == "feature-based":
        values = settings.feature_based.flat()
        labels |= {name: values[name] for name in ("feature_layers", "lstm_size", "lstm_layers")}
    return read_config(source, **labels)
