"""A model and the tokenizer it was trained with, opened together and checked against each other."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from transformers import BertConfig, PreTrainedModel

from bertfast.data.tokenizer import load_tokenizer
from bertfast.models.files import load, read_config, report_differences, resolve
from bertfast.models.patch import require_packed

HEADS = ("bert.pooler.", "pooler.", "cls.", "classifier.", "qa_outputs.")


def open_tokenizer(folder: Path, config: BertConfig) -> Tokenizer:
    """The tokenizer in a model's folder; ValueError if it knows more tokens than the model."""
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer.get_vocab_size()
    if tokens > config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} knows {tokens} tokens and the model {config.vocab_size}: "
            "they do not belong together"
        )
    return tokenizer


def open_model(kind: type[PreTrainedModel], name: str, head: str) -> tuple[PreTrainedModel, Tokenizer]:
    """Open a model in evaluation mode, on the CPU, and its tokenizer.

    Args:
        kind: The model's class.
        name: Folder or hub id.
        head: Begins the names of the weights without which its answers mean nothing; "": there are none.

    Raises:
        ValueError: There are no such weights, or the model cannot run on packed batches.
    """
    folder = resolve(name)
    config = read_config(folder)
    tokenizer = open_tokenizer(folder, config)
    model, missing, unexpected = load(kind, folder, config)
    if head and any(key.startswith(head) for key in missing):
        raise ValueError(f"{name} has no weights {head}…, so it was not trained as a {kind.__name__}")
    # That a folder also holds heads for something else is no news to who asks for this one.
    report_differences(model, name, missing, [key for key in unexpected if not key.startswith(HEADS)])
    require_packed(model)
    return model, tokenizer


def sequence_length(wanted: int | None, config: BertConfig) -> int:
    """The most tokens a sequence may have: what is wanted, by default as many as the model has positions."""
    positions = config.max_position_embeddings
    if wanted is None:
        return positions
    if not 4 <= wanted <= positions:
        raise ValueError(f"max_seq_length must be from 4 to {positions}, the positions of the model; got {wanted}")
    return wanted
