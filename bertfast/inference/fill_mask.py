"""`bertfast fill-mask`: predict the tokens at [MASK] with a masked language model."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tyro.conf import Positional

from bertfast.data.special_tokens import mask_token
from bertfast.data.text_files import STANDARD_INPUT, read_standard_input
from bertfast.encoder import masked_lm_logits, pack
from bertfast.inference.int8_speed import log_int8_speed
from bertfast.inference.text_rows import no_texts
from bertfast.models.bert import BertForMaskedLM
from bertfast.runtime.precision import require_finite
from bertfast.runtime.settings import Count, Settings, checked
from bertfast.tasks.pretrained import open_model, sequence_length


@dataclass(frozen=True)
class FillMaskSettings(Settings):
    """Text and model of `bertfast fill-mask`.

    Attributes:
        model_name_or_path: Folder or hub id of a model with a masked-LM head, and its tokenizer.
        text: A text that contains [MASK] (<mask> for a RoBERTa, <|mask|> for a EuroBERT); "-": lines of standard input,
            each such a text.
        top_k: Number of tokens to print for each [MASK].
    """

    model_name_or_path: Positional[str]
    text: Positional[str]
    top_k: Count = 5


@torch.no_grad()
def fill_mask(model: BertForMaskedLM, tokenizer: Tokenizer, text: str, top_k: int = 5) -> list[list[tuple[str, float]]]:
    """Predict the tokens at each [MASK] of a text.

    Args:
        model: A masked language model in evaluation mode.
        tokenizer: Its tokenizer.
        text: A text that contains [MASK].
        top_k: Number of tokens per [MASK].

    Returns:
        For each [MASK], the `top_k` most probable tokens with their probabilities, most probable first.

    Raises:
        ValueError: There is no [MASK], the text has more tokens than the model has positions, it is not UTF-8, or
            `top_k` is less than 1 or more than the vocabulary has.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not UTF-8 (character {error.start + 1}); convert it to UTF-8") from None
    vocab_size, top_k = tokenizer.get_vocab_size(), checked("top_k", Count, top_k)
    if top_k > vocab_size:
        raise ValueError(f"--top-k must be at most {vocab_size}, the size of the vocabulary, got {top_k}")
    ids = tokenizer.encode(text).ids
    positions = sequence_length(None, model.config)
    if len(ids) > positions:
        raise ValueError(f"the text has {len(ids)} tokens, more than the model's {positions} positions")
    mask = mask_token(tokenizer)
    masked = [position for position, token in enumerate(ids) if token == tokenizer.token_to_id(mask)]
    if not masked:
        raise ValueError(f"no {mask} in {text!r}: write {mask} where a token is to be predicted")
    token_ids = torch.tensor([ids], device=model.device)
    packed = pack(model, token_ids, torch.tensor([0, len(ids)], dtype=torch.int32))
    logits = masked_lm_logits(model, packed, torch.tensor(masked, device=model.device))
    require_finite(logits, model.name_or_path)
    # vocab_size of a model may be rounded up; ids beyond the tokenizer's vocabulary are not predicted.
    best = logits[:, :vocab_size].float().softmax(1).topk(top_k)
    return [
        [(str(tokenizer.id_to_token(token)), probability) for token, probability in zip(tokens, values, strict=True)]
        for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def fill_mask_command(settings: FillMaskSettings) -> None:
    """Print the most probable tokens for each [MASK]."""
    if any("\ud800" <= character <= "\udfff" for character in settings.text):
        raise ValueError(
            "the text is not UTF-8: a byte of it is not part of a character; check the terminal's encoding"
        )
    model, tokenizer = open_model(BertForMaskedLM, settings.model_name_or_path, True)
    log_int8_speed(model, 16)  # about the tokens of a text
    if settings.text != "-":
        _print(settings.text, fill_mask(model, tokenizer, settings.text, settings.top_k))
        return
    number = 0
    for number, line in read_standard_input():
        text = line.rstrip("\r\n")
        try:
            predictions = fill_mask(model, tokenizer, text, settings.top_k)
        except ValueError as error:
            raise ValueError(f"{STANDARD_INPUT}, line {number}: {error}") from None
        _print(text, predictions)
    if not number:
        raise no_texts(None)


def _print(text: str, predictions_per_mask: list[list[tuple[str, float]]]) -> None:
    print(text)
    for number, predictions in enumerate(predictions_per_mask, 1):
        print(f"[MASK] {number}")
        for token, probability in predictions:
            print(f"  {probability:6.1%}  {token}")
    sys.stdout.flush()  # for a program that writes the next text when it has read this answer
