"""Initial model of a pre-training run: a published size with random weights, or an existing model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig

from bertfast.architectures.initialise import initialise
from bertfast.architectures.presets import Preset, preset_config
from bertfast.models.bert import BertForPreTraining
from bertfast.models.extensions import ExtendedBertConfig, class_for
from bertfast.models.files import config_from, load, read_config, report_differences
from bertfast.runtime.settings import nearest

_DETERMINED_BY = {  # entries of a configuration that overrides cannot change
    "hidden_dropout_prob": "--dropout",
    "attention_probs_dropout_prob": "--dropout",
    "vocab_size": "the tokenizer",
    "pad_token_id": "the tokenizer",
}


def initial_config(
    initial: Path | None,
    preset: Preset,
    overrides: str,
    dropout: float,
    max_positions: int | None,
    *,
    causal: bool = False,
) -> BertConfig:
    """Return the configuration of the initial model.

    Args:
        initial: Folder of an existing model; None: a model of the size `preset` with random weights.
        preset: Published size.
        overrides: Changes to the configuration, such as "hidden_size=256,hidden_act=relu".
        dropout: Dropout probability of hidden activations and attention weights.
        max_positions: Number of position embeddings; None: unchanged.
        causal: Whether the model is causal. Then [CLS] attends only to itself, and the last token is pooled instead.

    Raises:
        ValueError: An override is not a valid entry of the configuration, or repeats `max_positions`.
    """
    changes = _parse_overrides(overrides)
    changes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if max_positions is not None:
        if "max_position_embeddings" in changes:
            raise ValueError(
                "--max-positions and max_position_embeddings in --config-overrides set the same value: give only one"
            )
        changes["max_position_embeddings"] = max_positions
    if causal:
        changes |= {"is_decoder": True, "pool_last": True}
    if initial is not None:
        return read_config(initial, **changes)
    values = preset_config(preset).to_dict() | changes
    return config_from(values, "--config-overrides", ExtendedBertConfig if causal else BertConfig)


def initial_model(config: BertConfig, initial: Path | None) -> BertForPreTraining:
    """Return the initial model.

    Args:
        config: Its configuration.
        initial: Folder of an existing model, whose weights are loaded; None: random weights.
    """
    if initial is None:
        model = class_for(BertForPreTraining, config)(config)
        initialise(model)
        return model
    existing = read_config(initial).max_position_embeddings
    positions = config.max_position_embeddings
    config.max_position_embeddings = min(existing, positions)
    model, missing, unexpected = load(BertForPreTraining, initial, config)
    report_differences(model, str(initial), missing, unexpected)
    if positions > existing:
        _extend_positions(model, positions)
    return model


def _extend_positions(model: BertForPreTraining, positions: int) -> None:
    """Extend the position embeddings to `positions` rows.

    The new rows repeat the existing ones, which trains faster than random rows (Beltagy et al., 2020).
    """
    embeddings = model.bert.embeddings
    known = embeddings.position_embeddings.weight.detach()
    repeated = known.repeat(-(-positions // len(known)), 1)[:positions].clone()
    embeddings.position_embeddings = nn.Embedding(positions, known.shape[1], _weight=repeated)
    embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    types = torch.zeros(1, positions, dtype=torch.long)
    embeddings.register_buffer("token_type_ids", types, persistent=False)
    model.config.max_position_embeddings = positions


def _parse_overrides(text: str) -> dict[str, int | float | str]:
    """Parse "hidden_size=256,hidden_act=relu" to {"hidden_size": 256, "hidden_act": "relu"}."""
    types = {name: type(value) for name, value in BertConfig().to_dict().items()}
    changes: dict[str, int | float | str] = {}
    for entry in filter(None, text.split(",")):
        name, _, value = entry.partition("=")
        if types.get(name) not in (int, float, str) or name in ("model_type", "transformers_version"):
            known = [known for known, kind in types.items() if kind in (int, float, str)]
            raise ValueError(
                f"--config-overrides: {name!r} is not a size or option of a BERT configuration{nearest(name, known)}"
            )
        if name in _DETERMINED_BY:
            raise ValueError(f"--config-overrides: {name} would have no effect: {_DETERMINED_BY[name]} determines it")
        try:
            changes[name] = types[name](value)
        except ValueError:
            kind = {int: "an integer", float: "a number"}[types[name]]
            raise ValueError(f"--config-overrides: {name} must be {kind}, got {value!r}") from None
    return changes
