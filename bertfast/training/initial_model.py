"""What a pre-training run starts from: a published size with random weights, or a model that exists."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, PreTrainedModel

from bertfast.models.bert import BertForPreTraining
from bertfast.models.extensions import ExtendedBertConfig, class_for
from bertfast.models.files import load, read_config, report_differences
from bertfast.models.initialise import initialise
from bertfast.models.presets import Preset, preset_config


def initial_config(
    start: Path | None,
    preset: Preset,
    overrides: str,
    dropout: float,
    max_positions: int | None,
    *,
    causal: bool = False,
) -> BertConfig:
    """The configuration of the model in `start`, or of a preset, with what the settings change.

    `overrides` is like "hidden_size=256,hidden_act=relu". In a causal model [CLS] sees nothing but itself, so that
    what is pooled is a sequence's last token.
    """
    changes = _parse_overrides(overrides)
    changes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if max_positions is not None:
        changes["max_position_embeddings"] = max_positions
    if causal:
        changes |= {"is_decoder": True, "pool_last": True}
    if start is not None:
        return read_config(start, **changes)
    config = preset_config(preset, **changes)
    return ExtendedBertConfig.from_dict(config.to_dict()) if causal else config


def initial_model(config: BertConfig, start: Path | None) -> PreTrainedModel:
    """A model with random weights, or those of `start`."""
    if start is None:
        model = class_for(BertForPreTraining, config)(config)
        initialise(model)
        return model
    positions = min(config.max_position_embeddings, read_config(start).max_position_embeddings)
    wanted, config.max_position_embeddings = config.max_position_embeddings, positions
    model, missing, unexpected = load(BertForPreTraining, start, config)
    report_differences(model, str(start), missing, unexpected)
    if wanted > positions:
        _extend_positions(model, wanted)
    return model


def _extend_positions(model: PreTrainedModel, positions: int) -> None:
    """Give a model more positions.

    New ones start as the old ones over again, which is nearer the truth than noise (Beltagy et al., 2020).
    """
    embeddings = model.base_model.embeddings
    known = embeddings.position_embeddings.weight.detach()
    repeated = known.repeat(-(-positions // len(known)), 1)[:positions].clone()
    embeddings.position_embeddings = nn.Embedding.from_pretrained(repeated, freeze=False)
    embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    types = torch.zeros(1, positions, dtype=torch.long)
    embeddings.register_buffer("token_type_ids", types, persistent=False)
    model.config.max_position_embeddings = positions


def _parse_overrides(text: str) -> dict[str, int | float | str]:
    """ "hidden_size=256,hidden_act=relu" -> {"hidden_size": 256, "hidden_act": "relu"}."""
    types = {name: type(value) for name, value in BertConfig().to_dict().items()}
    changes = {}
    for entry in filter(None, text.split(",")):
        name, _, value = entry.partition("=")
        if types.get(name) not in (int, float, str) or name in ("model_type", "transformers_version"):
            raise ValueError(f"config_overrides: {name!r} is not a size or option of a BERT configuration")
        try:
            changes[name] = types[name](value)
        except ValueError:
            raise ValueError(f"config_overrides: {value!r} is no value for {name}, {types[name].__name__}") from None
    return changes
