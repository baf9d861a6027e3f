"""Check the entries of a model's configuration; messages say which one is wrong, and where it is from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import BertConfig
from transformers.activations import ACT2FN

from bertfast.architectures import Architecture
from bertfast.runtime.settings import Range

_SIZE = Range(1, 2**24)  # a larger one is damage, and would fill all memory
_SIZES = {  # entries of a configuration that are numbers of something, under BERT's names if it has them
    "vocab_size": _SIZE,
    "hidden_size": _SIZE,
    "num_hidden_layers": Range(1, 10_000),
    "num_attention_heads": _SIZE,
    "intermediate_size": _SIZE,
    "max_position_embeddings": _SIZE,
    "type_vocab_size": _SIZE,
}
_SIZES_OF_FAMILIES = {  # which another family's configuration may have, and may leave open
    "embedding_size": _SIZE,
    "num_key_value_heads": _SIZE,
    "head_dim": _SIZE,
    "local_attention": Range(0, 2**24),
    "global_attn_every_n_layers": Range(1, 10_000),
}
_PROBABILITY = Range(0, below=1)
_OPTIONS = {  # other numbers
    "layer_norm_eps": Range(0),
    "initializer_range": Range(0),
    "hidden_dropout_prob": _PROBABILITY,
    "attention_probs_dropout_prob": _PROBABILITY,
}
_OPTIONS_OF_FAMILIES = {
    "initializer_cutoff_factor": Range(above=0),
    "embedding_dropout": _PROBABILITY,
    "classifier_dropout": _PROBABILITY,
    "summary_last_dropout": _PROBABILITY,
    "qa_dropout": _PROBABILITY,
    "seq_classif_dropout": _PROBABILITY,
}
_PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")


def check_entries(values: dict[str, Any], architecture: Architecture, source: str | Path) -> None:
    """Raise ValueError if an entry is not a number in its range, or labels or task are not as they must be.

    Args:
        values: Entries of a configuration, before it is made of them.
        architecture: The family's adapter.
        source: The file or the flag that they are from.
    """
    for limits_by_name, types, number in (
        (_SIZES | _SIZES_OF_FAMILIES, (int,), "a whole number"),
        (_OPTIONS | _OPTIONS_OF_FAMILIES, (int, float), "a number"),
    ):
        for bert_name, limits in limits_by_name.items():
            name = architecture.config_name(bert_name)
            may_be_open = bert_name in _SIZES_OF_FAMILIES or bert_name in _OPTIONS_OF_FAMILIES
            if name not in values or (values[name] is None and may_be_open):
                continue
            if not (type(values[name]) in types and values[name] in limits):
                raise ValueError(f"{source}: {name} must be {number} {limits}, got {values[name]!r:.40}")
    _check_labels(values, source)


def check_config(config: BertConfig, architecture: Architecture, source: str | Path) -> None:
    """Raise ValueError if entries of a configuration do not fit together, or are not what they must be.

    Args:
        config: The configuration.
        architecture: Its family's adapter.
        source: The file or the flag that its entries are from.
    """
    activation_name = architecture.config_name("hidden_act")
    activation = getattr(config, activation_name)
    if not isinstance(activation, str) or activation not in ACT2FN:
        raise ValueError(f"{source}: {activation_name} must name an activation, such as gelu, got {activation!r}")
    if config.pad_token_id is None and architecture.padding_index is not None:
        raise ValueError(f"{source}: pad_token_id must be a token of the vocabulary, as positions follow from it")
    if config.pad_token_id is not None and config.pad_token_id not in range(config.vocab_size):
        raise ValueError(
            f"{source}: pad_token_id must be from 0 to {config.vocab_size - 1}, the last token of the vocabulary, got "
            f"{config.pad_token_id!r:.40}"
        )
    if config.problem_type not in _PROBLEM_TYPES:
        known = ", ".join(filter(None, _PROBLEM_TYPES))
        raise ValueError(f"{source}: problem_type must be one of {known}, got {config.problem_type!r:.40}")
    _check_heads(config, architecture, source)


def _check_heads(config: Any, architecture: Architecture, source: str | Path) -> None:
    """Raise ValueError if a model's columns cannot be divided among its heads, or its heads cannot be rotated."""
    hidden, heads = (architecture.config_name(name) for name in ("hidden_size", "num_attention_heads"))
    width, number = getattr(config, hidden), getattr(config, heads)
    if width % number:
        raise ValueError(f"{source}: {hidden} must be a multiple of {heads}, got {width} and {number}")
    groups = getattr(config, "num_key_value_heads", None)
    if groups is not None and number % groups:
        raise ValueError(f"{source}: {heads} must be a multiple of num_key_value_heads, got {number} and {groups}")
    dimension = getattr(config, "head_dim", None) or width // number
    if architecture.rotary is not None and dimension % 2:
        raise ValueError(
            f"{source}: rotary positions require an even head dimension, got {dimension} ({hidden} {width}, {heads} "
            f"{number}): change one of them"
        )


def _check_labels(values: dict[str, Any], source: str | Path) -> None:
    """Raise ValueError if the entries about labels and task are not a text for each id from 0, all different."""
    task = values.get("finetuning_task")
    if not isinstance(task, str | None):
        raise ValueError(f"{source}: finetuning_task must be the name of a task, got {task!r:.40}")
    names = values.get("id2label")
    if not isinstance(names, dict):
        return  # none, or of a type that transformers refuses
    ids = {str(number) for number in names}
    absent = next((number for number in range(len(names)) if str(number) not in ids), None)
    if absent is not None:
        raise ValueError(
            f"{source}: id2label must name the labels 0 to {len(names) - 1}, and has no {absent}: number them from 0 "
            "without gaps"
        )
    seen: dict[Any, Any] = {}
    for number, label in names.items():
        if not isinstance(label, str):
            raise ValueError(f"{source}: id2label names {number} {label!r:.40}: write it as a text, in quotes")
        if label in seen:
            raise ValueError(f"{source}: id2label calls both {seen[label]} and {number} {label!r:.40}: rename one")
        seen[label] = number
