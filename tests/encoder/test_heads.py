"""Losses and outputs of heads on packed batches, compared with transformers' heads on single sequences."""

import pytest
import torch
import transformers
from parity import SIZES, assert_as_accurate_as_torch
from torch import Tensor, nn

import bertfast
from bertfast import encoder
from bertfast.data.batches import Batch
from bertfast.encoder import heads
from bertfast.encoder.unpadding import Packed
from bertfast.ops.dropout import RngCoordinates
from bertfast.ops.sequences import Sequences

LENGTHS = [6, 9, 4]


def model_of(name: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.BertConfig(**SIZES | {"initializer_range": 0.2} | changes)).eval()
    bertfast.patch(model)
    return model


def packed_batch(padding_slots: int = 0, empty: int = 0, seed: Tensor | None = None) -> tuple[Packed, list[Tensor]]:
    """Return three sequences and `empty` more without a token; also as token ids, one row per sequence."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(53, (sum(LENGTHS),), generator=generator)
    sequences = Sequences.from_lengths(LENGTHS + [0] * empty, capacity=len(ids) + padding_slots)
    filled = torch.cat([ids, torch.zeros(padding_slots, dtype=torch.int64)])
    rng = None if seed is None else RngCoordinates(seed, sequences.token_sequence_ids, sequences.position)
    packed = Packed(filled, None, torch.zeros_like(filled), sequences.position, sequences, sequences.first, rng=rng)
    return packed, [part[None] for part in ids.split(LENGTHS)]


@pytest.mark.parametrize(("slots", "empty"), [(0, 0), (5, 2)])
def test_sequence_logits_equal_those_of_single_sequences(slots, empty):
    model = model_of("BertForSequenceClassification")
    packed, rows = packed_batch(slots, empty)
    expected = torch.cat([model(row).logits for row in rows])
    torch.testing.assert_close(heads.sequence_logits(model, packed)[:3], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("slots", "empty"), [(0, 0), (5, 2)])
@pytest.mark.parametrize(
    ("labels", "changes"),
    [
        (torch.tensor([2, 0, 1]), {}),
        (torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), {}),
        (torch.tensor([0.5, -1.0, 2.0]), {"num_labels": 1}),
    ],
    ids=["classes", "several", "values"],
)
def test_a_sequence_classification_loss_is_the_mean_over_sequences(labels, changes, slots, empty):
    model = model_of("BertForSequenceClassification", **changes)
    packed, rows = packed_batch(slots, 0)
    loss = heads.sequence_classification_loss(model, packed, labels, len(rows))
    torch.testing.assert_close(loss, sum(model(row, labels=labels[i : i + 1]).loss for i, row in enumerate(rows)) / 3)
    if empty and not labels.is_floating_point():  # unused sequences have the label -100
        packed, _ = packed_batch(slots, empty)
        filled = torch.cat([labels, torch.full((empty,), -100)])
        torch.testing.assert_close(heads.sequence_classification_loss(model, packed, filled, len(rows)), loss)


def test_the_mean_over_a_step_is_the_sum_over_its_batches():
    model = model_of("BertForSequenceClassification")
    packed, rows = packed_batch()
    labels = torch.tensor([2, 0, 1])
    whole = heads.sequence_classification_loss(model, packed, labels, 3)
    parts = []
    for row, label in zip(rows, labels, strict=True):
        sequences = Sequences.from_lengths([row.shape[1]])
        one = Packed(row[0], None, torch.zeros_like(row[0]), sequences.position, sequences, sequences.first)
        parts.append(heads.sequence_classification_loss(model, one, label[None], 3))
    torch.testing.assert_close(sum(parts), whole)


def test_a_multiple_choice_loss_is_over_the_choices():
    model = model_of("BertForMultipleChoice")
    packed, rows = packed_batch()
    loss = heads.multiple_choice_loss(model, packed, torch.tensor([2]), 1, num_choices=3)
    logits = torch.cat([model(row[None]).logits for row in rows], 1)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, torch.tensor([2])))


HEADS = {
    "BertForSequenceClassification": heads.sequence_logits,
    "BertForMultipleChoice": heads.sequence_logits,
    "BertForTokenClassification": heads.token_logits,
    "BertForQuestionAnswering": heads.span_logits,
}


@pytest.mark.parametrize("name", HEADS)
def test_autocast_rounds_no_logits_in_evaluation(name):
    model, call = model_of(name), HEADS[name]
    packed, _ = packed_batch()
    with torch.no_grad():
        truth = call(model.double(), packed)
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            found, rounded = call(model, packed), call(model.train(), packed)
    assert (found.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert not torch.equal(found, found.bfloat16().float())
    assert_as_accurate_as_torch(found, rounded, truth, dtype=torch.bfloat16)


@pytest.mark.parametrize("slots", [0, 5])
def test_token_logits_and_loss_equal_those_of_single_sequences(slots):
    model = model_of("BertForTokenClassification")
    packed, rows = packed_batch(slots)
    labels = torch.arange(len(packed.token_ids)) % 4 - 1
    labels = torch.where((labels < 0) | ~packed.sequences.is_token, -100, labels)
    expected = torch.cat([model(row).logits[0] for row in rows])
    torch.testing.assert_close(heads.token_logits(model, packed)[: len(expected)], expected, rtol=1e-4, atol=1e-5)
    loss = heads.token_classification_loss(model, packed, labels, (labels >= 0).sum())
    torch.testing.assert_close(loss, nn.functional.cross_entropy(expected, labels[: len(expected)]))


@pytest.mark.parametrize(("slots", "empty"), [(0, 0), (5, 2)])
def test_an_answers_softmax_runs_over_the_tokens_of_its_sequence(slots, empty):
    model = model_of("BertForQuestionAnswering", num_labels=2)
    packed, rows = packed_batch(slots, empty)
    starts, ends = torch.tensor([2, 8, 9]), torch.tensor([4, 8, 1])  # the third start is not a token
    none = torch.zeros(empty, dtype=torch.int64)
    loss = heads.question_answering_loss(model, packed, torch.cat([starts, none]), torch.cat([ends, none]), 3)
    outputs = [
        model(row, start_positions=start[None], end_positions=end[None])
        for row, start, end in zip(rows, starts, ends, strict=True)
    ]
    expected = sum(
        nn.functional.cross_entropy(logits, position[None])
        for output, pair in zip(outputs, zip(starts, ends, strict=True), strict=True)
        for logits, position in zip((output.start_logits, output.end_logits), pair, strict=True)
        if position < logits.shape[1]
    )
    torch.testing.assert_close(loss, expected / 2 / 3)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def pretraining_batch() -> tuple[Batch, list[Tensor], Tensor]:
    packed, rows = packed_batch()
    labels = torch.full((len(packed.token_ids),), -100)
    masked = torch.tensor([1, 4, 8, 12, 16])
    labels[masked] = torch.tensor([3, 9, 27, 50, 1])
    batch = Batch(
        token_ids=packed.token_ids,
        token_type_ids=packed.token_type_ids,
        position_ids=packed.position_ids,
        sequences=packed.sequences,
        masked_rows=masked,
        labels=labels[masked],
        next_sentence_labels=torch.tensor([0, 1, 1]),
        masked=5,
    )
    return batch, rows, labels


def test_pretraining_losses_equal_those_of_full_logits():
    model = model_of("BertForPreTraining")
    batch, rows, labels = pretraining_batch()
    sums = encoder.pretraining_loss(model, batch, None)
    outputs = [model(row) for row in rows]
    logits = torch.cat([output.prediction_logits[0] for output in outputs])
    pairs = torch.cat([output.seq_relationship_logits for output in outputs])
    entropy = nn.functional.cross_entropy
    torch.testing.assert_close(sums.masked_lm, entropy(logits, labels, reduction="sum"))
    torch.testing.assert_close(sums.next_sentence, entropy(pairs, batch.next_sentence_labels, reduction="sum"))
    assert sums.masked_correct == (logits.argmax(1) == labels).sum()
    torch.testing.assert_close(
        heads.masked_lm_logits(model, packed_batch()[0], batch.masked_rows),
        logits[batch.masked_rows],
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_family_says_where_its_masked_lm_head_is():
    model = model_of("BertForPreTraining")
    batch, _, _ = pretraining_batch()
    expected = encoder.pretraining_loss(model, batch, None)
    parts = model.masked_lm_parts()
    model.masked_lm_parts = lambda: parts
    model.head, model.cls = model.cls, None
    assert vars(encoder.pretraining_loss(model, batch, None)) == vars(expected)


def test_head_dropout_depends_only_on_seed_and_tokens():
    model = model_of("BertForSequenceClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.dropout.p = 0.5
    seed = torch.tensor(7)
    one = heads.sequence_logits(model, packed_batch(0, seed=seed)[0])
    same = heads.sequence_logits(model, packed_batch(5, 2, seed=seed)[0])[:3]
    other = heads.sequence_logits(model, packed_batch(0, seed=torch.tensor(8))[0])
    torch.testing.assert_close(one, same)
    assert not torch.allclose(one, other)
