"""How well a model fills blanks: masked-LM loss, accuracy and perplexity, next-sentence accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from bertfast.data.batches import Batch
from bertfast.data.shards import Shards
from bertfast.encoder import pretraining_loss
from bertfast.models import BertPreTrainedModel
from bertfast.training.precision import autocast


@torch.no_grad()
def validate(model: BertPreTrainedModel, batches: Iterable[Batch], precision: str) -> dict[str, float]:
    """Metrics of `model`, which is put into evaluation mode and back, over the batches' masked tokens and pairs."""
    training = model.training
    model.eval()
    sums = np.zeros(6)
    for batch in batches:
        with autocast(model.device, precision):
            loss = pretraining_loss(model, batch.to(model.device), None)
        sums += [
            loss.masked_lm.item(),
            loss.masked_correct.item(),
            loss.masked.item(),
            loss.next_sentence.item(),
            loss.next_sentence_correct.item(),
            loss.pairs.item(),
        ]
    model.train(training)
    masked_lm, correct, masked, next_sentence, next_correct, pairs = sums
    if not masked:
        raise ValueError("there is no masked token to validate on: the validation text is empty")
    metrics = {
        "validation_loss": masked_lm / masked,
        "validation_accuracy": correct / masked,
        "validation_perplexity": math.exp(min(masked_lm / masked, 700)),
        "validation_tokens": int(masked),
    }
    if pairs:
        metrics["next_sentence_loss"] = next_sentence / pairs
        metrics["next_sentence_accuracy"] = next_correct / pairs
    return metrics


def unigram_entropy(train: Shards, batches: Iterable[Batch]) -> float:
    """Nats per masked token of the best guess that looks at no context: the training text's word frequencies."""
    counts = np.ones(train.vocabulary_size)
    for part in train.parts:
        counts += np.bincount(part.tokens, minlength=train.vocabulary_size)
    surprise = -np.log(counts / counts.sum())
    labels = np.concatenate([batch.labels[: batch.masked].numpy() for batch in batches])
    return float(surprise[labels].mean())
