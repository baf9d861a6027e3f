"""`pretraining_loss` runs the last layer on fewer rows, without logits: same loss, same gradients."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from parity import CASES, models

from bertfast import encoder
from bertfast.data.batches import Batch
from bertfast.ops.dropout import draw_seed
from bertfast.ops.sequences import Sequences

LENGTHS = [6, 9, 4]
BY_NAME = {case.name: case for case in CASES}


def batch(padding_slots: int = 0, *, pairs: bool = True) -> Batch:
    """Return three sequences, with as many unused slots for tokens, for sequences and for masked tokens."""
    generator = torch.Generator().manual_seed(4)

    def random(high: int, size: int, rest: int) -> torch.Tensor:
        return torch.cat([torch.randint(high, (size,), generator=generator), torch.full((padding_slots,), rest)])

    used = sum(LENGTHS)
    sequences = Sequences.from_lengths(LENGTHS + [0] * padding_slots, capacity=used + padding_slots)
    return Batch(
        token_ids=random(53, used, 0),
        token_type_ids=random(2, used, 0),
        position_ids=sequences.position,
        sequences=sequences,
        masked_rows=torch.tensor([1, 4, 8, 12, 13, 16] + [0] * padding_slots),
        labels=random(53, 6, -100),
        next_sentence_labels=random(2, 3, -100) if pairs else None,
        masked=6,
    )


def full_loss(model, batch: Batch, train: bool) -> torch.Tensor:
    """Compute the same from the encoder's whole output, by the heads of transformers with all logits."""
    packed = encoder.pack(
        model.train(train), batch.token_ids[None], batch.sequences.cu_seqlens, batch.token_type_ids[None]
    )
    hidden = encoder.encode(model.bert, packed)
    logits, next_sentence = model.cls(hidden, encoder.pooled(model, hidden[packed.first]))
    masked_lm = F.cross_entropy(logits[batch.masked_rows[: batch.masked]], batch.labels[: batch.masked])
    return masked_lm + F.cross_entropy(next_sentence, batch.next_sentence_labels)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_loss_and_gradients_equal_those_of_the_full_computation(train, layers):
    model = models(BY_NAME["pretraining"], num_hidden_layers=layers)[0].double()
    given = batch()
    torch.manual_seed(5)
    seed = draw_seed(torch.device("cpu")) if train else None
    sums = encoder.pretraining_loss(model, given, seed)
    assert (sums.masked.item(), sums.pairs.item()) == (6, 3)
    fused = sums.masked_lm / sums.masked + sums.next_sentence / sums.pairs
    our_gradients = gradients(model, fused)
    torch.manual_seed(5)
    whole = full_loss(model, given, train)
    torch.testing.assert_close(fused, whole)
    for name, gradient in gradients(model, whole).items():
        torch.testing.assert_close(our_gradients[name], gradient, msg=f"{name}: {{}}".format)


def test_counts_are_those_of_the_logits():
    model, _ = models(BY_NAME["pretraining"])
    given = batch(padding_slots=2)
    outputs = model(
        given.token_ids[None], token_type_ids=given.token_type_ids[None], cu_seq_lens_q=given.sequences.cu_seqlens
    )
    best = outputs.prediction_logits[0].argmax(1)[given.masked_rows[:6]]
    labels = torch.where(torch.arange(6) < 4, best, (best + 1) % 53)
    given = replace(given, labels=torch.cat([labels, given.labels[6:]]))
    sums = encoder.pretraining_loss(model, given, None)
    assert sums.masked_correct.item() == 4
    right = outputs.seq_relationship_logits[:3].argmax(1) == given.next_sentence_labels[:3]
    assert sums.next_sentence_correct.item() == right.sum()


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_padding_slots_change_nothing(train, pairs):
    model = models(BY_NAME["pretraining"])[0].double()
    seed = torch.tensor(99) if train else None
    results = []
    for padding_slots in (0, 7):
        sums = encoder.pretraining_loss(model, batch(padding_slots, pairs=pairs), seed)
        results.append((sums, gradients(model, sums.masked_lm + sums.next_sentence) if pairs else {}))
    (sums, plain), (more, padded) = results
    for name, value in vars(sums).items():
        torch.testing.assert_close(getattr(more, name), value, msg=f"{name}: {{}}".format)
    for name, gradient in plain.items():
        torch.testing.assert_close(padded[name], gradient, msg=f"{name}: {{}}".format)


def test_masked_lm_without_pairs_needs_no_pooler():
    model, _ = models(BY_NAME["masked_lm"])
    sums = encoder.pretraining_loss(model, batch(pairs=False), None)
    assert (sums.next_sentence.item(), sums.pairs.item()) == (0, 0)
    sums.masked_lm.backward()
    assert model.get_input_embeddings().weight.grad.isfinite().all()


def test_micro_batches_sum_to_the_whole_batch():
    """Micro-batches have the loss and the gradients of the whole batch, with dropout."""
    model = models(BY_NAME["pretraining"])[0].double()
    seed, whole = torch.tensor(99), batch()
    sums = encoder.pretraining_loss(model, whole, seed)
    expected = gradients(model, sums.masked_lm + sums.next_sentence)
    model.zero_grad()
    starts = whole.sequences.cu_seqlens.tolist()
    for number, (start, end) in enumerate(pairwise(starts)):
        here = (whole.masked_rows >= start) & (whole.masked_rows < end)
        part = Batch(
            token_ids=whole.token_ids[start:end],
            token_type_ids=whole.token_type_ids[start:end],
            position_ids=whole.position_ids[start:end],
            sequences=Sequences.from_lengths([end - start], sequence_ids=[number]),
            masked_rows=whole.masked_rows[here] - start,
            labels=whole.labels[here],
            next_sentence_labels=whole.next_sentence_labels[number : number + 1],
            masked=int(here.sum()),
        )
        sums = encoder.pretraining_loss(model, part, seed)
        (sums.masked_lm + sums.next_sentence).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=f"{name}: {{}}".format)
