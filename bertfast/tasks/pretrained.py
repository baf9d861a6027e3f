"""Open a model together with its tokenizer, and check that they match."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import BertConfig, PreTrainedModel

from bertfast.models.extensions import class_for
from bertfast.models.families import architecture_of
from bertfast.models.files import load, read_config, report_differences, resolve
from bertfast.models.patch import require_packed
from bertfast.models.tokenizers import load_any_tokenizer
from bertfast.runtime.precision import InferencePrecision, choose_precision

logger = logging.getLogger("bertfast")

_MAX_PADDING = 512  # vocabularies are often padded to a multiple of a power of two, for efficient GEMMs

Model = TypeVar("Model", bound=PreTrainedModel)


class MissingHeadError(ValueError):
    """A model has no weights of the head without which its predictions are meaningless."""


def open_tokenizer(folder: Path, config: BertConfig) -> Tokenizer:
    """Open the tokenizer in a model's folder; ValueError if its vocabulary is larger than the model's."""
    tokenizer = load_any_tokenizer(folder)
    require_vocabulary(tokenizer, folder, config)
    return tokenizer


def require_vocabulary(tokenizer: Tokenizer, path: Path, config: BertConfig) -> None:
    """Raise ValueError if the vocabulary of the tokenizer at `path` is larger than a model's; warn if it is smaller."""
    vocab_size = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer in {path} has {vocab_size} tokens, but the model's vocab_size is {config.vocab_size}: "
            "they do not belong together"
        )
    if config.vocab_size - vocab_size >= _MAX_PADDING:
        logger.warning(
            "the tokenizer in %s has %d tokens, but the model's vocab_size is %d: check that they belong together",
            path,
            vocab_size,
            config.vocab_size,
        )


def open_model(
    model_class: type[Model],
    name: str,
    needs_head: bool,
    device: torch.device | None = None,
    precision: InferencePrecision = "fp32",
) -> tuple[Model, Tokenizer]:
    """Open a model in evaluation mode, and its tokenizer.

    Args:
        model_class: The model's class, or the one of BERT that is like it.
        name: Folder or hub id.
        needs_head: Whether its predictions are meaningless without the weights of its head.
        device: Device of the model; None: the CPU.
        precision: Precision in which it will run.

    Raises:
        MissingHeadError: There are no such weights.
        ValueError: The model cannot run on packed batches.
    """
    folder = resolve(name)
    config = read_config(folder)
    tokenizer = open_tokenizer(folder, config)
    model, missing, unexpected = load(model_class, folder, config, takes_quantised=True)
    architecture = architecture_of(config)
    absent = [head for head in architecture.head_prefixes(model_class) if any(key.startswith(head) for key in missing)]
    if needs_head and absent:
        kind = class_for(model_class, config).__name__
        raise MissingHeadError(f"{name} has no weights {absent[0]}…, so it was not trained as a {kind}")
    heads = (f"{model.base_model_prefix}.pooler.", "pooler.", *architecture.all_head_prefixes)
    # Checkpoints often contain heads of other tasks: not worth a warning.
    report_differences(model, name, missing, [key for key in unexpected if not key.startswith(heads)])
    if device is not None:
        nn.Module.to(model, device)  # transformers' own `to` has no usable type
    require_packed(model, choose_precision(model.device, precision, model.config))
    return model, tokenizer


def sequence_length(max_seq_length: int | None, config: BertConfig) -> int:
    """Return the maximum tokens per sequence: the setting, or by default the model's number of positions.

    Raises:
        ValueError: The setting is below 4 or exceeds the model's positions.
    """
    positions = architecture_of(config).max_positions(config)
    if max_seq_length is None:
        return positions
    if not 4 <= max_seq_length <= positions:
        raise ValueError(
            f"--max-seq-length must be from 4 to {positions} (the model's number of positions), got {max_seq_length}"
        )
    return max_seq_length
