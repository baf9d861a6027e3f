"""Initial model of a pre-training run: a published size with random weights, or an existing model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint as activation_checkpoint
from transformers import BertConfig, PreTrainedModel

from bertfast.architectures import BERT, part_at
from bertfast.architectures.presets import ArchitectureName, Preset, preset_config
from bertfast.architectures.rope_theta import with_rope_theta
from bertfast.data.special_tokens import special_tokens
from bertfast.encoder import PackedModel
from bertfast.models.extensions import ExtendedBertConfig
from bertfast.models.families import architecture_of, pretraining_class
from bertfast.models.files import config_from, load, new_model, read_config, report_differences
from bertfast.models.registry import FusedModel
from bertfast.training.config_overrides import check_weights, layers_follow, parse_overrides
from bertfast.training.pretrain_settings import PretrainSettings, check_rope_theta, check_sizes, resolve_objective

_DROPOUT = 0.1  # of a model with random weights
_TOKEN_IDS = {  # entries of a configuration that name special tokens, and their names in `SpecialTokens`
    "pad_token_id": "pad",
    "bos_token_id": "cls",
    "cls_token_id": "cls",
    "eos_token_id": "sep",
    "sep_token_id": "sep",
}


def configure(settings: PretrainSettings, initial: Path | None) -> BertConfig:
    """Return the configuration of a run's initial model.

    Args:
        settings: Settings of the run.
        initial: Folder of an existing model; None: random weights.

    Raises:
        ValueError: The settings do not fit the model.
    """
    config = initial_config(
        initial,
        settings.model.preset,
        settings.model.config_overrides,
        settings.model.dropout,
        settings.model.max_positions,
        architecture=settings.model.architecture,
        causal=settings.sampling.objective == "ltr",
        rope_theta=settings.model.rope_theta,
    )
    check_rope_theta(settings, config.model_type)
    sampling = resolve_objective(settings, config.model_type).sampling
    if sampling.pairs and config.type_vocab_size < 2:
        raise ValueError(
            f"--objective {sampling.objective} requires a type_vocab_size of at least 2, one for each sentence of a "
            f"pair, and the model's is {config.type_vocab_size}: use --objective mlm"
        )
    check_sizes(settings, architecture_of(config).max_positions(config), config.num_hidden_layers)
    return config


def initial_config(
    initial: Path | None,
    preset: Preset,
    overrides: str,
    dropout: float | None,
    max_positions: int | None,
    *,
    architecture: ArchitectureName = "bert",
    causal: bool = False,
    rope_theta: float | None = None,
) -> BertConfig:
    """Return the configuration of the initial model.

    Args:
        initial: Folder of an existing model; None: a model of the size `preset` with random weights.
        preset: Published size.
        overrides: Changes to the configuration, such as "hidden_size=256,hidden_act=relu".
        dropout: Dropout probability of hidden activations and attention weights; None: that of the existing model, and
            0.1 of one with random weights.
        max_positions: Number of tokens that a sequence may have; None: unchanged.
        architecture: Family of a model with random weights.
        causal: Whether the model is causal. Then [CLS] attends only to itself, and the last token is pooled instead.
        rope_theta: Base of the angles of rotary positions, of a family that has them; None: unchanged.

    Raises:
        ValueError: An override is not a valid entry of the configuration, repeats `max_positions`, or contradicts the
            weights of the existing model.
    """
    base = preset_config(preset, architecture=architecture) if initial is None else read_config(initial)
    adapter = architecture_of(base)
    changes = parse_overrides(overrides, base)
    if max_positions is not None:
        if "max_position_embeddings" in changes:
            raise ValueError(
                "--max-positions and max_position_embeddings in --config-overrides set the same value: give only one"
            )
        changes["max_position_embeddings"] = max_positions + adapter.first_position(base)
    positions_flag = "--max-positions" if max_positions is not None else "--config-overrides: max_position_embeddings"
    if initial is not None:
        check_weights(changes, base, initial, positions_flag)
    changes = layers_follow(changes, base)
    if dropout is not None or initial is None:
        probability = _DROPOUT if dropout is None else dropout
        names = map(adapter.config_name, ("hidden_dropout_prob", "attention_probs_dropout_prob"))
        changes |= {name: probability for name in names if hasattr(base, name)}
    if rope_theta is not None and adapter.rotary is not None:
        changes["rope_parameters"] = with_rope_theta(adapter, base, rope_theta)
    if causal and adapter is BERT:
        changes |= {"is_decoder": True, "pool_last": True}
    source = "--config-overrides" if overrides or max_positions is None else "--max-positions"
    if initial is not None:
        return read_config(initial, source=source, **changes)
    kind: Any = ExtendedBertConfig if causal and adapter is BERT else type(base)
    return config_from(base.to_dict() | changes, source, kind)


def adapt_to_tokenizer(config: BertConfig, tokenizer: Tokenizer, initial: Path | None) -> None:
    """Set what the tokenizer determines: the size of the vocabulary and, with random weights, the special tokens.

    Args:
        config: Configuration of the initial model, changed in place; the number of tokens of a sequence stays.
        tokenizer: Tokenizer of the text.
        initial: Folder of an existing model, whose vocabulary may be larger; None: random weights.
    """
    size = tokenizer.get_vocab_size()
    if initial is not None:
        config.vocab_size = max(config.vocab_size, size)
        return
    adapter, special = architecture_of(config), special_tokens(tokenizer)
    positions = adapter.max_positions(config)
    config.vocab_size = size
    for name, role in _TOKEN_IDS.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, getattr(special, role))
    config.max_position_embeddings = positions + adapter.first_position(config)


def initial_model(config: BertConfig, initial: Path | None) -> FusedModel:
    """Return the initial model.

    Args:
        config: Its configuration.
        initial: Folder of an existing model, whose weights are loaded; None: random weights.
    """
    kind = pretraining_class(config)
    if initial is None:
        return new_model(kind, config)
    existing = read_config(initial).max_position_embeddings
    positions = config.max_position_embeddings
    config.max_position_embeddings = min(existing, positions)
    model, missing, unexpected = load(kind, initial, config)
    report_differences(model, str(initial), missing, unexpected)
    if positions > existing:
        _extend_positions(model, positions)
    return model


def train_in_part(model: FusedModel, *, pairs: bool, checkpoint_layers: int) -> None:
    """Freeze what no loss depends on, and have the activations of layers recomputed.

    Args:
        model: The model.
        pairs: Whether it is trained on sentence pairs, too: then nothing is frozen.
        checkpoint_layers: Number of layers, counted from the first.
    """
    encoder: Any = model.base_model
    if not pairs:
        for unused in filter(None, (getattr(encoder, "pooler", None), model.masked_lm_parts().next_sentence)):
            unused.requires_grad_(False)
    layers: Any = encoder_layers(model)  # its items have attributes that ModuleList does not know
    for layer in layers[:checkpoint_layers]:
        layer.gradient_checkpointing = True
        # Dropout masks are a function of seed and position: there is no RNG state to restore.
        layer._gradient_checkpointing_func = partial(
            activation_checkpoint, use_reentrant=False, preserve_rng_state=False
        )


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of a fused model's encoder."""
    encoder = cast(PackedModel, model.base_model)
    return encoder.packed_modules()[1]


def _extend_positions(model: FusedModel, rows: int) -> None:
    """Extend the table of position embeddings to `rows` rows.

    The new rows repeat the existing ones, which trains faster than random rows (Beltagy et al., 2020).
    """
    architecture, config = architecture_of(model.config), model.config
    embeddings: nn.Module = part_at(model.base_model, architecture.embeddings)
    path = architecture.embedding.get("position_embeddings")
    if path is not None:
        table: nn.Embedding = part_at(embeddings, path)
        known, first = table.weight.detach(), architecture.first_position(config)
        times = -(-(rows - first) // (len(known) - first))
        repeated = torch.cat([known[:first], known[first:].repeat(times, 1)])[:rows].clone()
        setattr(embeddings, path, nn.Embedding(rows, known.shape[1], table.padding_idx, _weight=repeated))
    for name, values in {"position_ids": torch.arange(rows), "token_type_ids": torch.zeros(rows).long()}.items():
        if hasattr(embeddings, name):
            embeddings.register_buffer(name, values[None], persistent=False)
    config.max_position_embeddings = rows
