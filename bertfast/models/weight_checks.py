"""Check that a checkpoint has the encoder that its configuration describes; messages name the weight that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from bertfast.models.families import architecture_of
from bertfast.models.weights import Weights, is_computed


def check_loaded(
    model: PreTrainedModel,
    name: str,
    info: Mapping[str, Any],
    stored: Weights,
    fresh: tuple[str, ...] = (),
    *,
    other_head: str = "",
) -> tuple[list[str], list[str]]:
    """Check that a model has got all weights of its encoder, in their shapes, and that none was left over.

    Args:
        model: The model.
        name: Its folder or hub id, for messages.
        info: What transformers says of loading it, with `ignore_mismatched_sizes`.
        stored: The weights of the checkpoint.
        fresh: What the names of parameters begin with that may be missing, or have other shapes.
        other_head: What to do, besides, about a head of another shape, for messages.

    Returns:
        The names of parameters that the checkpoint lacks, and of weights that the model does not have.

    Raises:
        ValueError: Weights have other shapes than the model's, or weights of the encoder are missing or not used.
    """
    missing = [key for key in model.state_dict() if key in info["missing_keys"]]
    unexpected = sorted({*info["unexpected_keys"]} - dict(model.named_buffers()).keys())
    _refuse_mismatched(model, name, info["mismatched_keys"], stored, fresh, other_head)
    _refuse_missing(model, name, missing, stored, fresh)
    _refuse_unused(model, name, unexpected)
    return missing, unexpected


def _refuse_mismatched(
    model: PreTrainedModel, name: str, mismatched: Any, stored: Weights, fresh: tuple[str, ...], other_head: str
) -> None:
    """Raise ValueError if weights have other shapes than the model's."""
    keys = {entry if isinstance(entry, str) else entry[0] for entry in mismatched}  # transformers 5 adds the shapes
    for key in model.state_dict():
        if key in keys and not key.startswith(fresh):
            implied = list(model.get_parameter(key).shape)
            # Names in a checkpoint of the encoder alone lack the prefix of the model's, and the other way round.
            shape = next([*x.shape] for other, x in stored.items() if key.endswith(other) or other.endswith(key))
            raise ValueError(
                f"{name}: {key} has shape {shape}, but config.json implies {implied}: use the config.json that belongs "
                f"to the weights{'' if _of_encoder(model, [key]) else other_head}"
            )


def _refuse_missing(
    model: PreTrainedModel, name: str, missing: list[str], stored: Weights, fresh: tuple[str, ...]
) -> None:
    """Raise ValueError if the checkpoint has no encoder, or lacks weights of it."""
    architecture = architecture_of(model.config)
    own = {key for key in model.state_dict() if f"{architecture.layers}." in key}
    if own and own <= {*missing}:
        example = f"{architecture.layers}.0.{architecture.layer['output_dense']}.weight"
        raise ValueError(
            f"{name} has no weights of an encoder, such as {model.base_model_prefix}.{example}; it has "
            f"{', '.join(sorted(stored)[:3]) or 'none at all'}: rename them as transformers' "
            f"{architecture.prefix}Model names them"
        )
    absent = [key for key in _of_encoder(model, missing) if not key.startswith(fresh)]
    if absent:
        others = f" and {len(absent) - 1} more" * (len(absent) > 1)
        raise ValueError(
            f"{name} lacks weights that its config.json describes, {absent[0]}{others}: take the config.json that "
            "belongs to the weights"
        )


def _refuse_unused(model: PreTrainedModel, name: str, unexpected: list[str]) -> None:
    """Raise ValueError if the model has no use for weights of the encoder: its outputs would be those of another."""
    unused = [key for key in _of_encoder(model, unexpected) if not is_computed(key)]
    if unused:
        others = f" and {len(unused) - 1} more" * (len(unused) > 1)
        raise ValueError(
            f"{name} has weights that its config.json does not describe, {unused[0]}{others}: take the config.json "
            "that belongs to the weights, or remove them if they have no effect"
        )


def _of_encoder(model: PreTrainedModel, keys: list[str]) -> list[str]:
    """Return the names of weights that belong to the encoder, not to a head or a pooler."""
    architecture = architecture_of(model.config)
    names = (architecture.layers, architecture.embeddings, architecture.projection, architecture.final_norm)
    parts = [f"{part}." for part in names if part]
    return [key for key in keys if any(part in key for part in parts)]
