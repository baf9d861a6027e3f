"""`--config-overrides`: changes to the configuration of the initial model of a pre-training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, BertConfig, PretrainedConfig

from bertfast.architectures import BERT, Architecture
from bertfast.models.families import architecture_of
from bertfast.runtime.settings import nearest

# Entries of a configuration that overrides cannot change, under BERT's names.
_DETERMINED_BY = {
    "hidden_dropout_prob": "--dropout",
    "attention_probs_dropout_prob": "--dropout",
    "vocab_size": "the tokenizer",
    "pad_token_id": "the tokenizer",
    "bos_token_id": "the tokenizer",
    "eos_token_id": "the tokenizer",
    "cls_token_id": "the tokenizer",
    "sep_token_id": "the tokenizer",
    "mask_token_id": "the tokenizer",
    "is_decoder": "--objective",
    "rope_parameters": "--rope-theta",
    "layer_types": "global_attn_every_n_layers",
}
# Options that transformers' classes read, and that masked-LM training of an encoder has no use for.
_UNUSED = ("add_cross_attention", "deterministic_flash_attn", "pretraining_tp", "use_cache")
# Options that configurations take, and either do not list or leave open.
_UNLISTED: dict[str, type] = {"classifier_dropout": float, "global_attn_every_n_layers": int}
_KINDS: dict[type, str] = {bool: "true or false", float: "a number", int: "an integer", str: "a text"}
_BOOLEANS = {"true": True, "false": False}
# Sizes and options that show in the weights or in what they mean, under BERT's names.
_OF_WEIGHTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "type_vocab_size",
    "embedding_size",
    "num_key_value_heads",
    "head_dim",
    "attention_bias",
    "mlp_bias",
    "norm_bias",
    "decoder_bias",
    "sinusoidal_pos_embds",
    "tie_word_embeddings",
)


def parse_overrides(text: str, base: BertConfig) -> dict[str, Any]:
    """Parse "hidden_size=256,hidden_act=relu" to {"hidden_size": 256, "hidden_act": "relu"}.

    Args:
        text: The changes, under BERT's names or the family's.
        base: The configuration that is changed.

    Returns:
        The changes under the family's names.

    Raises:
        ValueError: An entry is not one of the configuration, is determined by something else, is given twice, or its
            value is of another type.
    """
    adapter = architecture_of(base)
    types = _types(adapter)
    determined = {adapter.config_name(name): by for name, by in _DETERMINED_BY.items()}
    changes: dict[str, Any] = {}
    for entry in filter(None, text.split(",")):
        name, _, value = entry.partition("=")
        own = adapter.config_name(name)
        if own in determined and hasattr(base, own):
            raise ValueError(f"--config-overrides: {name} would have no effect: {determined[own]} determines it")
        if own not in types:
            family = "BERT" if adapter is BERT else adapter.model_type
            known = [*types, *adapter.config_names]
            raise ValueError(
                f"--config-overrides: {name!r} is not a size or option of a {family} configuration"
                f"{nearest(name, known)}"
            )
        if own in changes:
            raise ValueError(f"--config-overrides: {name} is given twice: leave one out")
        changes[own] = _read(name, value, types[own])
    return changes


def _types(adapter: Architecture) -> dict[str, type]:
    """Return the types of the entries that overrides may change, under the family's names."""
    defaults = CONFIG_MAPPING[adapter.model_type]().to_dict()
    generic = PretrainedConfig().to_dict().keys() - {"tie_word_embeddings"}
    types: dict[str, type] = {
        name: type(value)
        for name, value in defaults.items()
        if type(value) in _KINDS and name not in (*generic, *_UNUSED, "model_type")
    }
    unlisted = ["classifier_dropout"] if "classifier_dropout" in defaults else []
    unlisted += ["global_attn_every_n_layers"] if "local_attention" in defaults else []
    types |= {name: _UNLISTED[name] for name in unlisted}
    return types


def _read(name: str, value: str, kind: type) -> Any:
    try:
        return _BOOLEANS[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        raise ValueError(f"--config-overrides: {name} must be {_KINDS[kind]}, got {value!r}") from None


def layers_follow(changes: dict[str, Any], base: BertConfig) -> dict[str, Any]:
    """Return changes to a configuration, and what follows from them: the kinds of a ModernBERT's layers."""
    names = [name for name in ("num_hidden_layers", "global_attn_every_n_layers") if name in changes]
    is_other = any(changes[name] != getattr(base, name, None) for name in names)
    return changes | {"layer_types": None} if is_other and getattr(base, "layer_types", None) else changes


def check_weights(changes: Mapping[str, Any], base: BertConfig, initial: Path, positions_flag: str) -> None:
    """Raise ValueError if changes contradict the weights of an existing model.

    Args:
        changes: Changes to its configuration, under the family's names.
        base: Its configuration.
        initial: Its folder.
        positions_flag: The flag that changes the number of positions.
    """
    adapter = architecture_of(base)
    fixed = {adapter.config_name(name) for name in _OF_WEIGHTS}
    for name, value in changes.items():
        if name in fixed and value != getattr(base, name, value):
            raise ValueError(
                f"--config-overrides: {name}={value} contradicts the weights of {initial}, whose {name} is "
                f"{getattr(base, name)}: leave it out, or train from random weights without --init-from"
            )
    positions = changes.get("max_position_embeddings", base.max_position_embeddings)
    if adapter.rotary is None and positions < base.max_position_embeddings:
        first = adapter.first_position(base) if positions_flag == "--max-positions" else 0
        raise ValueError(
            f"{positions_flag} must be at least {base.max_position_embeddings - first}, as {initial} has weights for "
            f"as many positions, got {positions - first}: shorten sequences with --max-seq-length"
        )
