"""Validation of a pre-trained model: masked-LM loss, accuracy and perplexity, next-sentence accuracy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from bertfast.data.batches import Batch, Batches
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.samples import Sampling
from bertfast.data.shards import Shards
from bertfast.data.special_tokens import special_tokens
from bertfast.data.tokenizer import continuation_tokens, load_tokenizer
from bertfast.encoder import PretrainingLoss, pretraining_loss
from bertfast.models.bert import BertForMaskedLM
from bertfast.models.families import architecture_of, class_like, pretraining_class
from bertfast.models.files import load, read_config, resolve
from bertfast.models.patch import require_packed
from bertfast.models.registry import FusedModel
from bertfast.runtime.precision import Precision, autocast, choose_device, choose_precision, require_finite
from bertfast.tasks.pretrained import require_vocabulary, sequence_length
from bertfast.training.distributed import Distributed


@torch.no_grad()
def validate(
    model: FusedModel,
    batches: Sequence[Batch],
    precision: str,
    objective: Callable[..., PretrainingLoss] | None = None,
    distributed: Distributed | None = None,
) -> dict[str, float]:
    """Compute the metrics of a model in evaluation mode over the masked tokens and pairs of batches.

    Args:
        model: The model; it is returned to its mode afterwards.
        batches: Batches to validate on, on the CPU.
        precision: fp32, bf16 or fp16.
        objective: Computes the losses of a batch, called as objective(batch, None); None: `pretraining_loss` of the
            model.
        distributed: Processes that divide the batches among them; None: only this one.

    Raises:
        NotFiniteError: The losses are not finite.
        ValueError: There is no masked token.
    """
    training = model.training
    model.train(False)
    objective = objective or partial(pretraining_loss, model)
    distributed = distributed or Distributed(0, 1, model.device)
    sums = torch.zeros(6, dtype=torch.float64, device=distributed.device)
    for first in range(0, len(batches), distributed.world_size):  # every rank runs equally many batches
        index = first + distributed.rank
        with autocast(distributed.device, precision):
            loss = objective(batches[min(index, len(batches) - 1)].to(distributed.device), None)
        if index < len(batches):
            sums += torch.stack([getattr(loss, field.name).double() for field in dataclasses.fields(loss)])
    model.train(training)
    sums = distributed.sum(sums)
    require_finite(sums, model.name_or_path)
    masked_lm, correct, masked, next_sentence, next_correct, pairs = sums.tolist()
    if not masked:
        raise ValueError("there is no masked token to validate on: provide more validation text")
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
    """Return the loss of the unigram baseline, in nats per masked token.

    The baseline predicts vocabulary entries by their frequency in the training text and ignores the context.
    """
    counts = np.ones(train.vocab_size)
    for part in train.parts:
        counts += np.bincount(part.tokens, minlength=train.vocab_size)
    surprise = -np.log(counts / counts.sum())
    labels = np.concatenate([batch.labels[: batch.masked].numpy() for batch in batches])
    return float(surprise[labels].mean())


def evaluate_masked_lm(
    name: str, text: str, *, max_seq_length: int | None, tokens_per_batch: int, precision: Precision, device: str | None
) -> dict[str, float]:
    """Validate a model on text, with the same masked tokens in every call.

    Args:
        name: Folder or hub id of the model. With a next-sentence head and at least two documents in the text,
            sentence pairs are classified as well.
        text: Text file or folder.
        max_seq_length: Maximum sequence length in tokens; None: the model's number of positions.
        tokens_per_batch: Tokens per batch.
        precision: auto, fp32, bf16 or fp16.
        device: Device to compute on; None: a GPU if one is available.

    Raises:
        ValueError: The model has no masked-LM head, or there is no text.
    """
    folder = resolve(name)
    config = read_config(folder)
    architecture, kind = architecture_of(config), class_like(BertForMaskedLM, config)
    model, missing, _ = load(pretraining_class(config), folder, config)
    (head,) = architecture.head_prefixes(kind)
    if any(key.startswith(head) for key in missing):
        raise ValueError(f"{name} has no weights {head}…, so it was not trained as a {kind.__name__}")
    tokenizer = load_tokenizer(folder)  # that of the shards; transformers' may add tokens
    require_vocabulary(tokenizer, folder, model.config)
    nn.Module.to(model, choose_device(device))  # transformers' own `to` has the type of a plain function
    chosen_precision = choose_precision(model.device, precision, model.config)
    require_packed(model, chosen_precision)
    length = sequence_length(max_seq_length, model.config)
    if tokens_per_batch < length:
        raise ValueError(f"--eval-tokens must be at least --max-seq-length {length}, got {tokens_per_batch}")
    with TemporaryDirectory() as scratch:
        corpus = CorpusSettings(train_file=[text], tokenizer_name=str(folder), validation_split_percentage=0)
        shards = Shards.open(prepare(PrepareSettings(scratch, corpus)) / "train")
        next_sentence = architecture.head.get("next_sentence")
        pairs = next_sentence is not None and f"{next_sentence}.weight" not in missing and shards.documents > 1
        batches = Batches(
            shards,
            special_tokens(tokenizer),
            continuation_tokens(tokenizer, whole_word=False),
            Sampling(max_seq_length=length, objective="mlm+nsp" if pairs else "mlm"),
            tokens_per_bin=tokens_per_batch,
            bins_per_step=1,
            seed=0,
        )
        return validate(model, list(batches.first_epoch()), chosen_precision)
