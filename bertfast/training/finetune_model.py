"""The task and the model of a fine-tuning run."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.optim import Optimizer
from transformers import BertConfig, PreTrainedModel

from bertfast.data.tokenizer import tokenizer_hash
from bertfast.models.adapters import Adapter, remove_adapter
from bertfast.models.extensions import class_for
from bertfast.models.families import architecture_of
from bertfast.models.files import load, new_model, read_config, report_differences, resolve, save
from bertfast.models.sentence_folder import encoder_folder
from bertfast.models.tokenizers import load_any_tokenizer
from bertfast.models.weights import ADAPTED_CONFIG, CONFIG, is_adapter
from bertfast.runtime.settings import refuse_without_effect
from bertfast.tasks.embedding import EmbeddingTask
from bertfast.tasks.features import Features
from bertfast.tasks.registry import choose_task
from bertfast.tasks.task import FINETUNING_TASK, Task
from bertfast.training.finetune_settings import FinetuneSettings
from bertfast.training.layerwise_decay import layerwise_scale
from bertfast.training.optimizer import build_optimizers

logger = logging.getLogger("bertfast")

# Tasks that are not known by the class of their models, which sentence-transformers opens.
_RECORDED_TASKS = ("embedding", "reranking")


def finetuning_task(settings: FinetuneSettings) -> Task[Any]:
    """Return the task of a run."""
    task = choose_task(settings, file=settings.train_file)
    if settings.feature_based.strategy == "feature-based":
        if task.feature_based_model is None:
            raise ValueError("--strategy feature-based is only available for token classification")
        task.model_class = task.feature_based_model
    if isinstance(task, EmbeddingTask) and settings.model.bilstm:
        refuse_without_effect(["--bilstm"], "embeddings are pooled from the encoder's output")
    return task


def choose_metric(settings: FinetuneSettings, task: Task[Any]) -> str:
    """Return the name of the metric that selects the best model."""
    known = task.metrics
    metric = (settings.evaluation.metric_for_best_model or known[0]).removeprefix("eval_")
    if metric not in known:
        raise ValueError(f"--metric-for-best-model must be one of {', '.join(known)} in this task, got {metric!r}")
    return metric


def score_of(metrics: dict[str, float], metric: str) -> tuple[float, float]:
    """Return how good a model is, more is better: its metric, negative for the loss, and its negative loss.

    The loss decides between models with the same metric. Tasks without a loss on validation data have 0. A metric that
    is undefined, and so missing from `metrics`, is worse than any other.

    Args:
        metrics: Metrics of the validation, such as eval_accuracy.
        metric: Name of the metric that decides, such as accuracy.
    """
    return sign_of(metric) * metrics.get(f"eval_{metric}", worst_of(metric)), -metrics.get("eval_loss", 0.0)


def worst_of(metric: str) -> float:
    """Return the value of a metric that is worse than any other."""
    return -math.inf * sign_of(metric)


def sign_of(metric: str) -> int:
    """Return 1 if higher values of a metric are better, else -1."""
    return -1 if metric == "loss" else 1


def model_config(settings: FinetuneSettings, source: Path, labels: dict[str, Any]) -> BertConfig:
    """Return the configuration of the model that a run trains.

    Args:
        settings: Settings of the run.
        source: Folder of the model to fine-tune.
        labels: Entries that follow from the task's labels.
    """
    old = read_config(source)
    names, known = labels.get("id2label"), old.id2label
    if names is not None and sorted((known or {}).values()) == sorted(names.values()):
        labels = labels | {"id2label": known}
    if (dropout := settings.model.dropout) is not None:
        labels |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    if settings.task != "auto":
        labels |= {FINETUNING_TASK: settings.task}
    elif FINETUNING_TASK not in labels and getattr(old, FINETUNING_TASK, None) in _RECORDED_TASKS:
        labels |= {FINETUNING_TASK: None}  # else the new model would be taken for one of these
    if settings.model.bilstm:
        labels |= {"bilstm": True}
    if settings.feature_based.strategy == "feature-based":
        values = settings.feature_based.flat()
        labels |= {name: values[name] for name in ("feature_layers", "lstm_size", "lstm_layers")}
    return read_config(source, **labels)


def build_model(
    settings: FinetuneSettings, task: Task[Any], config: BertConfig, tokenizer: Tokenizer, saved: Path | None
) -> tuple[PreTrainedModel, Adapter | None]:
    """Return the model that a run trains, on the CPU, and its adapter if only that is trained.

    Args:
        settings: Settings of the run.
        task: Its task.
        config: Configuration of the model.
        tokenizer: Its tokenizer.
        saved: Checkpoint from which the run continues; None: it starts from the initial model.
    """
    with_adapter = settings.lora.lora_rank is not None
    if saved is not None and not with_adapter:
        return load(task.model_class, saved, config)[0], None
    if settings.model.random_init:
        return new_model(task.model_class, config), None
    model, missing = _initial_model(settings, task, config, tokenizer)
    if not with_adapter:
        return model, None
    adapter = _add_adapter(settings, model, missing)
    if saved is not None:
        adapter.load(saved)
    return model, adapter


def _initial_model(
    settings: FinetuneSettings, task: Task[Any], config: BertConfig, tokenizer: Tokenizer
) -> tuple[PreTrainedModel, list[str]]:
    """Return the model from which a run starts, and the names of its parameters that are new."""
    name = settings.model.init_from_task or settings.model_name_or_path
    initial = encoder_folder(resolve(name))
    old_config, other_task = read_config(initial), settings.model.init_from_task is not None
    if other_task and tokenizer_hash(load_any_tokenizer(initial)) != tokenizer_hash(tokenizer):
        raise ValueError(
            f"{name} has another tokenizer than {resolve(settings.model_name_or_path)}: --init-from-task needs a model "
            "with the same one"
        )
    kind = class_for(task.model_class, config)
    other_task |= kind.__name__ not in (old_config.architectures or [])
    other_task |= old_config.id2label != config.id2label
    fresh = architecture_of(config).head_prefixes(kind) if other_task else ()  # the head of another task
    model, missing, unexpected = load(task.model_class, initial, config, fresh=fresh)
    report_differences(model, name, missing, unexpected)
    return model, missing


def _add_adapter(settings: FinetuneSettings, model: PreTrainedModel, missing: list[str]) -> Adapter:
    """Return a new adapter in a model, of which the head and the modules of missing parameters are trained whole."""
    options, name = settings.lora, settings.model.init_from_task or settings.model_name_or_path
    assert options.lora_rank is not None
    folder = resolve(name)
    base = encoder_folder(folder)
    if is_adapter(base) and not options.lora_merge:
        raise ValueError(
            f"{name} is itself an adapter, on which peft can put no other: add --lora-merge, with which the output is "
            "a whole model"
        )
    heads = architecture_of(model.config).head_prefixes(type(model))
    named = dict(model.named_parameters())
    adapter = Adapter(
        model,
        str(base.resolve()) if Path(name).is_dir() or base != folder else name,
        {_module_of(model, key) for key in named if key.startswith(heads) or key in missing},
        rank=options.lora_rank,
        alpha=2 * options.lora_rank if options.lora_alpha is None else options.lora_alpha,
        dropout=options.lora_dropout,
        targets=options.lora_target_modules,
        config_file=ADAPTED_CONFIG if getattr(model.config, FINETUNING_TASK, None) in _RECORDED_TASKS else CONFIG,
    )
    trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    every = sum(x.numel() for x in model.parameters())
    logger.info("training %s of %s parameters (%.2g %%)", f"{trained:,}", f"{every:,}", 100 * trained / every)
    return adapter


def _module_of(model: PreTrainedModel, key: str) -> str:
    """Return what the names begin with of the parameters of the head, or of the module in the encoder, with this one.

    Args:
        model: The model.
        key: Name of a parameter, such as "classifier.dense.weight" or "bert.pooler.dense.weight".
    """
    encoder = f"{model.base_model_prefix}."
    inside = encoder if model.base_model is not model and key.startswith(encoder) else ""
    return f"{inside}{key.removeprefix(inside).partition('.')[0]}."


def open_best(settings: FinetuneSettings, model: PreTrainedModel, config: BertConfig, adapter: Adapter | None) -> None:
    """Load the best model of a run into its model, and merge its adapter if that is to be done.

    Args:
        settings: Settings of the run.
        model: The model.
        config: Its configuration.
        adapter: Its adapter if only that is trained.
    """
    folder = Path(settings.output_dir)
    if adapter is None:
        model.load_state_dict(load(type(model), folder, config)[0].state_dict())
        return
    adapter.load(folder)
    if settings.lora.lora_merge:
        adapter.merge()
        save(model, folder)
        remove_adapter(folder)


def finetuning_optimizers(settings: FinetuneSettings, model: PreTrainedModel) -> list[Optimizer]:
    """Return the optimizers of the model that a run trains."""
    options = settings.optimizer
    scale_of = layerwise_scale(options.layerwise_lr_decay, model.config.num_hidden_layers)
    betas = options.adam_beta1, options.adam_beta2
    rate = settings.hyperparameters.learning_rate
    return build_optimizers(model, options.optimizer, rate, options.weight_decay, betas, scale_of)


def single_labels(features: Features, flag: str) -> np.ndarray:
    """Return the labels of examples or tokens, int64.

    Args:
        features: Training data.
        flag: Flag that requires them.

    Raises:
        ValueError: The task has no labels of this kind.
    """
    labels = features.labels.get("labels")
    if labels is None or labels.ndim > 1 or np.issubdtype(labels.dtype, np.floating):
        raise ValueError(f"{flag} requires a task in which every example or word has one of several labels")
    return labels


def balanced_weights(features: Features, num_labels: int) -> Tensor:
    """Return a weight per label, inversely proportional to its frequency in the training data, fp32 [labels]."""
    labels = single_labels(features, "--class-weights")
    counts = np.bincount(labels[labels >= 0], minlength=num_labels).clip(min=1)
    return torch.tensor(counts.sum() / (len(counts) * counts), dtype=torch.float32)
