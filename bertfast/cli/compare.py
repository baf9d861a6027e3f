"""The same model in bertfast and in `transformers`, and padded batches of text to compare them on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn

from bertfast.data.docstrings import docstring_documents
from bertfast.data.text_files import is_standard_input, read_lines, read_standard_input, require_input
from bertfast.data.truncation import truncation_side
from bertfast.encoder import has_token_types
from bertfast.inference.text_rows import source_name
from bertfast.models.bert import BertModel
from bertfast.models.extensions import ExtendedBertConfig
from bertfast.models.families import class_like
from bertfast.models.files import class_named_by, load, read_config, report_differences, resolve
from bertfast.runtime.precision import choose_device
from bertfast.runtime.settings import Count, Settings
from bertfast.tasks.pretrained import open_tokenizer, sequence_length

# transformers' argument: attribute of a `tokenizers.Encoding`
_ENCODING_FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


@dataclass(frozen=True, kw_only=True)
class TextSettings(Settings):
    """Which texts to run a model on, and where.

    Attributes:
        input_file: Text file with one text per line; "-": standard input. If not given: the docstrings of the installed
            Python packages.
        texts: Number of texts.
        per_device_batch_size: Texts per batch.
        max_seq_length: Maximum sequence length in tokens, beyond which inputs are truncated. If not given: the model's
            number of positions.
        device: Device such as "cpu" or "cuda:0". If not given: a GPU if one is available.
    """

    input_file: str | None = None
    texts: Count = 64
    per_device_batch_size: Count = 32
    max_seq_length: Count | None = None
    device: str | None = None


@dataclass(frozen=True)
class Comparison:
    """One model in both libraries, in evaluation mode and with the same weights.

    Attributes:
        bertfast: The model of bertfast.
        hf: The model of transformers.
        batches: Padded inputs for either: input_ids, attention_mask and token_type_ids, int64 [rows, columns].
    """

    bertfast: nn.Module
    hf: nn.Module
    batches: list[dict[str, Tensor]]


def open_both(name: str, settings: TextSettings) -> Comparison:
    """Open a model in both libraries and tokenize the texts.

    Args:
        name: Folder or hub id of the model.
        settings: Texts and device.

    Raises:
        ValueError: There is no text, or the model has parts that transformers does not have.
    """
    require_input(settings.input_file)
    folder, device = resolve(name), choose_device(settings.device)
    config = read_config(folder)
    if isinstance(config, ExtendedBertConfig):
        raise ValueError(f"{name} has parts that transformers does not have, so there is nothing to compare with")
    model_class = class_named_by(config, folder)
    if model_class.__name__.endswith("ForMultipleChoice"):
        # Multiple choice takes several texts per example, and these are single ones.
        model_class = class_like(BertModel, config)
    tokenizer = open_tokenizer(folder, config)
    length = sequence_length(settings.max_seq_length, config)
    tokenizer.enable_truncation(length, direction=truncation_side(tokenizer))
    padding = config.pad_token_id or 0
    tokenizer.enable_padding(pad_id=padding, pad_token=str(tokenizer.id_to_token(padding)))
    # Before the texts, as those of installed packages take minutes to collect.
    fused, missing, unexpected = load(model_class, folder, config)
    report_differences(fused, name, missing, unexpected)
    batches = _batches(tokenizer, settings, device)
    if not has_token_types(config):
        batches = [{name: x for name, x in batch.items() if name != "token_type_ids"} for batch in batches]
    hf = getattr(transformers, model_class.__name__)(copy.deepcopy(config))
    hf.load_state_dict(fused.state_dict())
    hf.config.use_cache = False
    nn.Module.to(fused, device)  # transformers' own `to` has no usable type
    return Comparison(fused, hf.eval().to(device), batches)


def outputs(model: nn.Module, batch: dict[str, Tensor], autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return a model's output tensors for a batch by name; outputs of tokens, [rows, columns, …], are 0 at padding.

    Args:
        model: A model of either library.
        batch: Its arguments.
        autocast: dtype to autocast to; None: no autocast.
    """
    mask = batch["attention_mask"].bool()
    with nullcontext() if autocast is None else torch.autocast(mask.device.type, autocast):
        results = model(**batch)
    return {
        name: value.masked_fill(~mask.view(*mask.shape, *[1] * (value.dim() - 2)), 0)
        if value.shape[:2] == mask.shape
        else value
        for name, value in results.items()
        if isinstance(value, Tensor)
    }


def _batches(tokenizer: Tokenizer, settings: TextSettings, device: torch.device) -> list[dict[str, Tensor]]:
    texts = [*islice(filter(None, map(str.strip, _texts(settings.input_file))), settings.texts)]
    if not texts:
        raise ValueError(f"{source_name(settings.input_file)} holds no text: it needs one text per line")
    batches = []
    for first in range(0, len(texts), settings.per_device_batch_size):
        encodings = tokenizer.encode_batch(texts[first : first + settings.per_device_batch_size])
        batches.append(
            {
                name: torch.tensor([getattr(encoding, field) for encoding in encodings], device=device)
                for name, field in _ENCODING_FIELDS.items()
            }
        )
    return batches


def _texts(file: str | None) -> Iterator[str]:
    if file is not None:
        yield from (line for _, line in (read_standard_input() if is_standard_input(file) else read_lines(Path(file))))
    else:
        for _, _, paragraphs in docstring_documents(processes=1):
            yield from paragraphs
