"""How well a model fills blanks: masked-LM loss, accuracy and perplexity, next-sentence accuracy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import PreTrainedModel

from bertfast.data.batches import Batch, Batches
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.samples import Sampling
from bertfast.data.shards import Shards
from bertfast.data.tokenizer import continuation_tokens, special_tokens
from bertfast.encoder import PretrainingLoss, pretraining_loss
from bertfast.models.bert import BertForPreTraining
from bertfast.models.files import load, resolve
from bertfast.models.patch import require_packed
from bertfast.runtime.precision import autocast, choose_device, choose_precision
from bertfast.tasks.pretrained import open_tokenizer, sequence_length
from bertfast.training.distributed import Distributed


@torch.no_grad()
def validate(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    precision: str,
    objective: Callable[..., PretrainingLoss] | None = None,
    distributed: Distributed | None = None,
) -> dict[str, float]:
    """Metrics of `model`, which is put into evaluation mode and back, over the batches' masked tokens and pairs.

    `objective` computes the loss of a batch, where that is not for the model alone to do; `ranks` share the batches.
    """
    training = model.training
    model.eval()
    objective = objective or partial(pretraining_loss, model)
    distributed = distributed or Distributed(0, 1, model.device)
    sums = torch.zeros(6, dtype=torch.float64, device=distributed.device)
    for first in range(0, len(batches), distributed.world_size):  # every rank runs as many batches
        mine = first + distributed.rank
        with autocast(distributed.device, precision):
            loss = objective(batches[min(mine, len(batches) - 1)].to(distributed.device), None)
        if mine < len(batches):
            sums += torch.stack([getattr(loss, field.name).double() for field in dataclasses.fields(loss)])
    model.train(training)
    masked_lm, correct, masked, next_sentence, next_correct, pairs = distributed.sum(sums).tolist()
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
    counts = np.ones(train.vocab_size)
    for part in train.parts:
        counts += np.bincount(part.tokens, minlength=train.vocab_size)
    surprise = -np.log(counts / counts.sum())
    labels = np.concatenate([batch.labels[: batch.masked].numpy() for batch in batches])
    return float(surprise[labels].mean())


def evaluate_masked_lm(
    name: str, text: str, *, max_seq_length: int | None, tokens_per_batch: int, precision: str, device: str | None
) -> dict[str, float]:
    """`validate` a model (folder or hub id) on a text file or folder, with a mask that is the same every time.

    Sentence pairs are judged too where the model has a head for them.
    """
    folder = resolve(name)
    model, missing, _ = load(BertForPreTraining, folder)
    if "cls.predictions.transform.dense.weight" in missing:
        raise ValueError(f"{name} has no weights cls.predictions…, so it was not trained as a BertForMaskedLM")
    pairs = "cls.seq_relationship.weight" not in missing
    tokenizer = open_tokenizer(folder, model.config)
    require_packed(model)
    length = sequence_length(max_seq_length, model.config)
    with TemporaryDirectory() as scratch:
        corpus = CorpusSettings(train_file=[text], tokenizer_name=str(folder), validation_split_percentage=0)
        shards = Shards.open(prepare(PrepareSettings(scratch, corpus)) / "train")
        batches = Batches(
            shards,
            special_tokens(tokenizer),
            continuation_tokens(tokenizer),
            Sampling(max_seq_length=length, objective="mlm+nsp" if pairs else "mlm"),
            tokens_per_bin=max(tokens_per_batch, length),
            bins_per_step=1,
            seed=0,
        )
        model = model.to(choose_device(device))
        return validate(model, list(batches.first_epoch()), choose_precision(model.device, precision))
