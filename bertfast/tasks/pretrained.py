"""A model and the tokenizer it was trained with, opened together and checked against each other."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from bertfast import checkpoint
from bertfast.config import BertConfig
from bertfast.data.tokenizer import load_tokenizer
from bertfast.models import BertPreTrainedModel

HEADS = ("bert.pooler.", "cls.", "classifier.", "qa_outputs.")


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


def open_model(kind: type[BertPreTrainedModel], name: str, head: str) -> tuple[BertPreTrainedModel, Tokenizer]:
    """A model in evaluation mode, on the CPU, and its tokenizer.

    `head` begins the names of the weights without which its answers mean nothing: ValueError if there are none.
    """
    folder = checkpoint.resolve(name)
    config = BertConfig.from_pretrained(folder)
    tokenizer = open_tokenizer(folder, config)
    weights = checkpoint.read_weights(folder)
    if not any(key.startswith(head) for key in weights):
        raise ValueError(f"{name} has no weights {head}…, so it was not trained as a {kind.__name__}")
    model = kind(config)
    # That a folder also holds heads for something else is no news to who asks for this one.
    known = model.state_dict().keys()
    weights = {key: value for key, value in weights.items() if key in known or not key.startswith(HEADS)}
    checkpoint.load_weights(model, weights, name)
    return model.eval(), tokenizer


def sequence_length(wanted: int | None, config: BertConfig) -> int:
    """The most tokens a sequence may have: what is wanted, by default as many as the model has positions."""
    positions = config.max_position_embeddings
    if wanted is None:
        return positions
    if not 4 <= wanted <= positions:
        raise ValueError(f"max_seq_length must be from 4 to {positions}, the positions of the model; got {wanted}")
    return wanted
