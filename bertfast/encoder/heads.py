"""The outputs and losses of task heads on packed batches: what programs call instead of a head's `forward`.

Each function takes a model with a task's head and calls its `task_steps()`, or reads its `masked_lm_parts()`; the model
must be one that `bertfast.report` shows fused whole. A loss is the sum over the batch's labels divided by `num_items`,
so that the batches of a step can be accumulated.

In evaluation, logits are fp32 also under autocast: rounded to 16 bits, those of similar inputs would be equal, and they
could not be ranked. Heads for sequences run in fp32 throughout, those for tokens in their last layer.

T packed tokens, S sequences, R gathered rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertfast import ops
from bertfast.data.batches import Batch
from bertfast.encoder.encode import encode
from bertfast.encoder.linear import apply_linear
from bertfast.encoder.parts import PackedHead, PackedMaskedLM, PackedModel, has_token_types
from bertfast.encoder.unpadding import Packed, unpad
from bertfast.ops.dropout import RngCoordinates
from bertfast.ops.reference import IGNORE_INDEX
from bertfast.ops.reference_parts import drop_hidden
from bertfast.ops.sequences import Sequences
from bertfast.runtime.torch_compat import autocast_dtype

Count = Tensor | float


@dataclass(frozen=True, eq=False)
class PretrainingLoss:
    """Sums over a batch, and the number of labels in each; 0-dimensional tensors.

    Attributes:
        masked_lm: Sum of the cross entropies of masked tokens in nats, fp32 at least.
        masked_correct: Number of masked tokens that are predicted correctly, int64.
        masked: Number of masked tokens, int64.
        next_sentence: Sum of the cross entropies of next-sentence labels in nats, fp32 at least.
        next_sentence_correct: Number of next-sentence labels that are predicted correctly, int64.
        pairs: Number of next-sentence labels, int64.
    """

    masked_lm: Tensor
    masked_correct: Tensor
    masked: Tensor
    next_sentence: Tensor
    next_sentence_correct: Tensor
    pairs: Tensor


def pack(
    model: PackedHead,
    input_ids: Tensor,
    cu_seq_lens_q: Tensor,
    token_type_ids: Tensor | None = None,
    max_length_q: int | None = None,
) -> Packed:
    """Make a packed batch of a task's sequences, with dropout if the model is in training mode.

    Args:
        model: Its configuration says by `pool_last` which token is pooled.
        input_ids, token_type_ids: int64 [1, T].
        cu_seq_lens_q: int32 [S + 1], where each sequence starts, and the end.
        max_length_q: Bound on the lengths of the sequences; None: they are read.
    """
    if not has_token_types(model.config):
        token_type_ids = None
    packed, _ = unpad(
        input_ids,
        token_type_ids=token_type_ids,
        cu_seq_lens_q=cu_seq_lens_q,
        max_length_q=max_length_q,
        positions=_packed_model(model).max_positions(),
        padding_index=_packed_model(model).padding_index(),
        training=model.training,
        pool_last=getattr(model.config, "pool_last", False),
    )
    return packed


def _encode(model: PackedHead, packed: Packed, rows: Tensor | None = None) -> Tensor:
    """Compute what a head reads at `rows`: the encoder's output, or that of a BiLSTM on it."""
    bilstm, encoder = getattr(model, "bilstm", None), _packed_model(model)
    if bilstm is None:
        return encode(encoder, packed, rows)
    # Reading the lengths copies them to the host.
    hidden: Tensor = bilstm(encode(encoder, packed), packed.sequences.lengths)
    return hidden if rows is None else hidden[rows]


def _packed_model(model: PackedHead) -> PackedModel:
    return cast(PackedModel, model.base_model)


def pretraining_loss(
    model: PackedMaskedLM, batch: Batch, seed: Tensor | None, *, residual_dtype: torch.dtype | None = None
) -> PretrainingLoss:
    """Compute the losses of masked LM, and of next sentence where the batch has pairs.

    The last layer runs only on the masked tokens and [CLS], and logits are never materialised.

    Args:
        model: Model with a masked-LM head, and where the batch has pairs a pooler and a next-sentence head.
        batch: The batch, with a fixed number of tokens, sequences and masked tokens.
        seed: int64 [], the seed of dropout; None: no dropout.
        residual_dtype: See `encode`.
    """
    sequences = batch.sequences
    rng = None if seed is None else RngCoordinates(seed, sequences.token_sequence_ids, sequences.position)
    positions, padding_index = batch.position_ids, _packed_model(model).padding_index()
    if padding_index is not None:  # the batch has no tokens of this id that would be skipped
        positions = positions + (padding_index + 1)
    packed = Packed(batch.token_ids, None, batch.token_type_ids, positions, sequences, sequences.first, rng=rng)
    rows, labels = batch.masked_rows, batch.next_sentence_labels
    read = rows if labels is None else torch.cat([rows, sequences.first])
    hidden = encode(_packed_model(model), packed, read, residual_dtype=residual_dtype)
    masked_lm, masked_correct, masked = masked_lm_loss(model, hidden[: len(rows)], batch.labels)
    if labels is None:
        zero, none = torch.zeros_like(masked_lm), torch.zeros_like(masked)
        return PretrainingLoss(masked_lm, masked_correct, masked, zero, none, none)
    next_sentence_head = model.masked_lm_parts().next_sentence
    assert next_sentence_head is not None, "the batch has pairs and the model no next-sentence head"
    logits = next_sentence_head(pooled(model, hidden[len(rows) :]))
    next_sentence = cross_entropy_sum(logits, labels)
    correct, pairs = (logits.argmax(1) == labels).sum(), (labels >= 0).sum()
    return PretrainingLoss(masked_lm, masked_correct, masked, next_sentence, correct, pairs)


def masked_lm_loss(model: PackedMaskedLM, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the masked-LM loss of rows that have labels.

    Args:
        model: Model with a masked-LM head.
        hidden: [R, H], the encoder's output at those rows.
        labels: int64 [R], -100 where a row does not count.

    Returns:
        The sum of the cross entropies (fp32 at least), how many rows predict their label, and how many have one.
    """
    parts = model.masked_lm_parts()
    hidden = parts.transform(hidden)
    return ops.linear_cross_entropy(hidden, None, parts.decoder.weight, parts.decoder.bias, labels)


def masked_lm_logits(model: PackedMaskedLM, packed: Packed, rows: Tensor) -> Tensor:
    """Compute the vocabulary's logits of some tokens.

    Args:
        model: Model with a masked-LM head.
        packed: The batch.
        rows: int64 [R], indices of the tokens.

    Returns:
        [R, V].
    """
    parts = model.masked_lm_parts()
    return apply_linear(parts.decoder, parts.transform(_encode(model, packed, rows)))


def sequence_logits(model: PackedHead, packed: Packed) -> Tensor:
    """Compute the logits of each sequence from what its head reads: its first token, or the mean of all.

    Args:
        model: Model with a head for sequences.
        packed: The batch.

    Returns:
        [S, labels]; of multiple choice [S, 1].
    """
    pooling, at_first = model.pooling(), packed.rng and packed.rng.at(packed.first)
    if pooling == "first":
        return _run_steps(model, _encode(model, packed, packed.first), at_first, per_sequence=True)
    hidden = _encode(model, packed)
    if pooling == "mean":
        return _run_steps(model, _mean_of_sequences(hidden, packed.sequences), at_first, per_sequence=True)
    return _mean_of_sequences(_run_steps(model, hidden, packed.rng), packed.sequences)


def _mean_of_sequences(x: Tensor, sequences: Sequences) -> Tensor:
    """Compute the mean over each sequence's tokens: [T, …] -> [S, …]."""
    x = x.masked_fill(~sequences.is_token[:, None], 0)  # padding slots may hold any values
    sums = x.new_zeros(len(sequences), x.shape[1]).index_add(0, sequences.sequence_index, x)
    return sums / sequences.cu_seqlens.diff()[:, None]


def sequence_classification_loss(model: PackedHead, packed: Packed, labels: Tensor, num_items: Count) -> Tensor:
    """Compute the loss of `config.problem_type`; where that is not set, the number and dtype of labels decide.

    Args:
        model: Model with a head for sequences.
        packed: The batch.
        labels: [S] of classes (int64, -100 ignored) or of values to regress, or [S, labels].
        num_items: Labels, or rows of them, in the whole step.
    """
    logits = sequence_logits(model, packed)
    problem = model.config.problem_type
    if problem is None:
        problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        problem = "regression" if logits.shape[1] == 1 else problem
    if problem == "single_label_classification":
        return cross_entropy_sum(logits, labels) / num_items
    logits = _at_least_fp32(logits)
    labels = labels.view_as(logits).to(logits.dtype)
    if problem == "regression":
        total = F.mse_loss(logits, labels, reduction="sum")
    elif problem == "multi_label_classification":
        total = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    else:
        raise ValueError(f"config.problem_type {problem!r} is unknown, so there is no loss for it")
    return total / logits.shape[1] / num_items  # a mean over rows and columns; `num_items` counts rows


def multiple_choice_loss(
    model: PackedHead, packed: Packed, labels: Tensor, num_items: Count, *, num_choices: int
) -> Tensor:
    """Compute the cross entropy between choices.

    Args:
        model: Model with a head that gives each sequence one logit.
        packed: The batch: one sequence per choice, the choices of an example in a row.
        labels: int64 [S / num_choices], the right choice of each example; -100 is ignored.
        num_items: Examples in the whole step.
        num_choices: Choices per example.

    Returns:
        [], the loss in nats per example of the step.
    """
    return cross_entropy_sum(sequence_logits(model, packed).view(-1, num_choices), labels) / num_items


def token_logits(model: PackedHead, packed: Packed) -> Tensor:
    """Compute the logits of each token.

    Args:
        model: Model with a head for tokens.
        packed: The batch.

    Returns:
        [T, labels].
    """
    return _run_steps(model, _encode(model, packed), packed.rng)


def token_classification_loss(model: PackedHead, packed: Packed, labels: Tensor, num_items: Count) -> Tensor:
    """Compute the cross entropy of tokens.

    Args:
        model: Model with a head for tokens.
        packed: The batch.
        labels: int64 [T]; -100 is ignored.
        num_items: Labels in the whole step.

    Returns:
        [], the loss in nats per label of the step.
    """
    return cross_entropy_sum(token_logits(model, packed), labels) / num_items


def span_logits(model: PackedHead, packed: Packed) -> Tensor:
    """Compute the logits of each token as the start and the end of the answer.

    Args:
        model: Model with a head for answers.
        packed: The batch.

    Returns:
        [T, 2].
    """
    return _run_steps(model, _encode(model, packed), packed.rng)


def question_answering_loss(
    model: PackedHead, packed: Packed, start_positions: Tensor, end_positions: Tensor, num_items: Count
) -> Tensor:
    """Compute the mean cross entropy of an answer's start and end, each a softmax over the sequence's own tokens.

    Args:
        model: Model with a head for answers.
        packed: The batch.
        start_positions, end_positions: int64 [S], positions in the sequences; ignored where no token is.
        num_items: Answers in the whole step.
    """
    sequences = packed.sequences
    logits = _at_least_fp32(span_logits(model, packed))
    starts, lengths = sequences.cu_seqlens[:-1].long(), sequences.cu_seqlens.diff().long()
    # logsumexp over each sequence [S, 2]; padding slots count as tokens of the last one, and get no weight.
    slots = torch.arange(len(logits), device=logits.device)
    scores = logits.masked_fill((slots >= sequences.cu_seqlens[-1])[:, None], float("-inf"))
    index = sequences.sequence_index[:, None].expand_as(scores)
    maxima = scores.new_full((len(lengths), 2), torch.finfo(scores.dtype).min)
    maxima = maxima.scatter_reduce(0, index, scores.detach(), "amax")
    sums = torch.zeros_like(maxima).scatter_add(0, index, (scores - maxima.gather(0, index)).exp())
    normaliser = maxima + sums.log()
    answers = torch.stack([start_positions.flatten(), end_positions.flatten()], 1)
    counts = (answers >= 0) & (answers < lengths[:, None])
    rows = (starts[:, None] + torch.where(counts, answers, 0)).clamp(max=len(logits) - 1)
    return torch.where(counts, normaliser - logits.gather(0, rows), 0).sum() / 2 / num_items


def pooled(model: PackedHead, first: Tensor) -> Tensor:
    """Call the pooler on the rows that represent their sequences.

    Args:
        model: Model whose encoder has a pooler.
        first: [S, H], the encoder's output at each sequence's [CLS].

    Returns:
        [S, H].
    """
    pooler = cast(nn.Module, model.base_model.pooler)
    output: Tensor = pooler(first[:, None])  # transformers' pooler reads column 0 of [batch, length, H]
    return output


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the sum of cross entropies.

    Args:
        logits: [R, classes].
        labels: int64 with R elements; -100 is ignored.

    Returns:
        [], in nats, fp32 at least.
    """
    return F.cross_entropy(_at_least_fp32(logits), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def _run_steps(model: PackedHead, rows: Tensor, rng: RngCoordinates | None, *, per_sequence: bool = False) -> Tensor:
    """Call what a head calls on rows of the encoder's output; dropout is a function of `rng`.

    Args:
        model: Model with a head.
        rows: [R, H].
        rng: Coordinates of the rows for dropout; None: no dropout.
        per_sequence: Whether there is one row per sequence, so that the whole head may run in fp32.
    """
    sites = iter(("classifier", "projection"))
    steps = model.task_steps()
    parameters = [x for step in steps if isinstance(step, nn.Module) for x in step.parameters()]
    exact = not model.training and all(x.dtype == torch.float32 for x in parameters)
    first_exact = 0 if per_sequence else len(steps) - 1
    for index, step in enumerate(steps):
        if isinstance(step, nn.Dropout):
            dropout = None if rng is None else rng.dropout(step.p, next(sites))
            rows = drop_hidden(rows, dropout)
        else:
            rows = in_fp32(step, rows) if exact and index >= first_exact else step(rows)
    return rows


def in_fp32(step: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Call a step of a head, which has fp32 parameters, on rows [R, H] as without autocast."""
    if autocast_dtype(rows.device) is None:
        return step(rows)
    with torch.autocast(rows.device.type, enabled=False):
        return step(rows.float())


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
