"""What a pre-training run starts from: a published size with random weights, or a model that exists."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bertfast import checkpoint
from bertfast.config import BertConfig, Preset
from bertfast.models import BertForPreTraining


def starting_config(
    start: Path | None, preset: Preset, overrides: str, dropout: float, max_positions: int | None
) -> BertConfig:
    """The configuration of the model in `start`, or of a preset, with what the settings change.

    `overrides` is like "hidden_size=256,hidden_act=relu".
    """
    changes = _parse_overrides(overrides)
    changes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if max_positions is not None:
        changes["max_position_embeddings"] = max_positions
    if start is None:
        return BertConfig.preset(preset, **changes)
    return BertConfig.from_pretrained(start, **changes)


def starting_model(config: BertConfig, start: Path | None) -> BertForPreTraining:
    """A model with random weights, or those of `start`."""
    model = BertForPreTraining(config)
    if start is None:
        return model
    weights = checkpoint.read_weights(start)
    key = next((key for key in weights if key.endswith("position_embeddings.weight")), None)
    positions = model.bert.embeddings.position_embeddings.weight
    if key is not None and len(weights[key]) < len(positions):
        # New positions start as the old ones over again, which is nearer the truth than noise (Beltagy et al., 2020).
        repeats = -(-len(positions) // len(weights[key]))
        weights[key] = weights[key].repeat(repeats, 1)[: len(positions)]
    checkpoint.load_weights(model, weights, str(start))
    return model


def _parse_overrides(text: str) -> dict[str, int | float | str]:
    """ "hidden_size=256,hidden_act=relu" -> {"hidden_size": 256, "hidden_act": "relu"}."""
    types = {entry.name: type(entry.default) for entry in dataclasses.fields(BertConfig)}
    changes = {}
    for entry in filter(None, text.split(",")):
        name, _, value = entry.partition("=")
        if types.get(name) not in (int, float, str):
            raise ValueError(f"config_overrides: {name!r} is not a size or option of a BERT configuration")
        try:
            changes[name] = types[name](value)
        except ValueError:
            raise ValueError(f"config_overrides: {value!r} is no value for {name}, {types[name].__name__}") from None
    return changes
