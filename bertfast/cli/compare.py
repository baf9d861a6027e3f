"""A model of one's own beside the same one in `transformers`, on batches of one's own text."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from bertfast.data.corpus import read_lines
from bertfast.data.docstrings import docstring_documents
from bertfast.models.bert import BertForMultipleChoice, BertModel
from bertfast.models.extensions import ExtendedBertConfig
from bertfast.models.files import class_named_by, load, read_config, report_differences, resolve
from bertfast.runtime.precision import choose_device
from bertfast.tasks.pretrained import open_tokenizer, sequence_length


@dataclass(kw_only=True)
class TextSettings:
    """Which texts, and where.

    Attributes:
        input_file: A text a line; "-": lines of standard input; none: the documentation of the Python packages here.
        texts: How many of them.
        per_device_batch_size: Texts at a time.
        max_seq_length: Tokens of a text at most, longer ones are cut; none: the positions of the model.
        device: cpu, cuda, cuda:1, …; none: a GPU if there is one.
    """

    input_file: str | None = None
    texts: int = 64
    per_device_batch_size: int = 32
    max_seq_length: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Beside:
    """Both models in evaluation mode, with the same weights, and padded batches for either."""

    ours: nn.Module
    theirs: nn.Module
    batches: list[dict[str, Tensor]]


def open_both(name: str, settings: TextSettings) -> Beside:
    """Raises ValueError if there is no text, or the model has parts that transformers does not know."""
    folder, device = resolve(name), choose_device(settings.device)
    config = read_config(folder)
    if isinstance(config, ExtendedBertConfig):
        raise ValueError(f"{name} has parts that transformers does not know, so there is nothing to compare with")
    kind = class_named_by(config)
    if kind is BertForMultipleChoice:
        kind = BertModel  # a text alone is no choice
    tokenizer = open_tokenizer(folder, config)
    tokenizer.enable_truncation(sequence_length(settings.max_seq_length, config))
    tokenizer.enable_padding()
    texts = [*islice(filter(None, map(str.strip, _texts(settings.input_file))), settings.texts)]
    if not texts:
        raise ValueError(f"there is no text in {settings.input_file}: give it a text a line")
    batches = []
    for first in range(0, len(texts), settings.per_device_batch_size):
        encoded = tokenizer.encode_batch(texts[first : first + settings.per_device_batch_size])
        fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        batches.append(
            {name: torch.tensor([getattr(one, own) for one in encoded], device=device) for name, own in fields.items()}
        )
    ours, missing, unexpected = load(kind, folder, config)
    report_differences(ours, name, missing, unexpected)
    theirs = getattr(transformers, kind.__name__)(copy.deepcopy(config))
    theirs.load_state_dict(ours.state_dict())
    theirs.config.use_cache = False
    return Beside(ours.to(device), theirs.eval().to(device), batches)


def outputs(model: nn.Module, batch: dict[str, Tensor], autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """What a model gives for a batch, zero at padding."""
    mask = batch["attention_mask"].bool()
    with nullcontext() if autocast is None else torch.autocast(mask.device.type, autocast):
        found = model(**batch)
    return {
        name: value.masked_fill(~mask.view(*mask.shape, *[1] * (value.dim() - 2)), 0)
        if value.shape[:2] == mask.shape
        else value
        for name, value in found.items()
        if isinstance(value, Tensor)
    }


def _texts(file: str | None) -> Iterator[str]:
    if file == "-":
        yield from sys.stdin
    elif file is not None:
        yield from (line for _, line in read_lines(Path(file)))
    else:
        for _, _, paragraphs in docstring_documents(processes=1):
            yield from paragraphs
