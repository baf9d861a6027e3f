"""Fill the blanks of a text with a masked language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import nn
from tyro.conf import Positional

from bertfast.data.tokenizer import special_tokens
from bertfast.encoder import masked_lm_logits, pack
from bertfast.models.bert import BertForMaskedLM
from bertfast.tasks.pretrained import open_model


@dataclass
class FillMaskSettings:
    """What to fill in, and with which model.

    Attributes:
        model_name_or_path: Folder or hub id of a model with a masked-LM head, and its tokenizer.
        text: A text with [MASK] wherever a word is to be filled in.
        top_k: How many words to name for each blank.
    """

    model_name_or_path: Positional[str]
    text: Positional[str]
    top_k: int = 5

    def __post_init__(self):
        if self.top_k < 1:
            raise ValueError(f"top_k is at least 1, got {self.top_k}")


@torch.no_grad()
def fill_mask(model: nn.Module, tokenizer: Tokenizer, text: str, top_k: int = 5) -> list[list[tuple[str, float]]]:
    """The `top_k` likeliest tokens of each [MASK] in `text`, with their probabilities, the likeliest first.

    `model` is a `BertForMaskedLM` in evaluation mode. ValueError if there is no [MASK] or the text is too long.
    """
    ids = tokenizer.encode(text).ids
    positions = model.config.max_position_embeddings
    if len(ids) > positions:
        raise ValueError(f"the text has {len(ids)} tokens, more than the {positions} positions of the model")
    blanks = [place for place, token in enumerate(ids) if token == special_tokens(tokenizer).mask]
    if not blanks:
        raise ValueError(f"no [MASK] in {text!r}: write [MASK] where a word is to be filled in")
    token_ids = torch.tensor([ids], device=model.device)
    packed = pack(model, token_ids, torch.tensor([0, len(ids)], dtype=torch.int32))
    logits = masked_lm_logits(model, packed, torch.tensor(blanks, device=model.device))
    # A model may have more embeddings than its tokenizer has tokens; the rest is no word.
    best = logits[:, : tokenizer.get_vocab_size()].float().softmax(1).topk(min(top_k, tokenizer.get_vocab_size()))
    return [
        [(tokenizer.id_to_token(token), probability) for token, probability in zip(tokens, values, strict=True)]
        for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def fill_mask_command(settings: FillMaskSettings) -> None:
    """Print the best words for each blank."""
    model, tokenizer = open_model(BertForMaskedLM, settings.model_name_or_path, "cls.predictions.transform")
    blanks = fill_mask(model, tokenizer, settings.text, settings.top_k)
    print(settings.text)
    for number, words in enumerate(blanks, 1):
        print(f"[MASK] {number}")
        for word, probability in words:
            print(f"  {probability:6.1%}  {word}")
