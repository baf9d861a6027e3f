"""The training loss of heads with a vocabulary is computed on labelled rows, without logits."""

import math

import pytest
import torch
import transformers
from live_models import MASK, VALUES, pair
from parity import SIZES
from torch import nn
from transformers.models.bert import modeling_bert

import bertfast


def language_values(name: str) -> dict[str, torch.Tensor]:
    values = {name: x for name, x in VALUES.items() if name != "labels"}
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(53, MASK.shape, generator=generator)
    labels = labels.masked_fill((torch.rand(MASK.shape, generator=generator) < 0.6) | ~MASK, -100)
    more = {"next_sentence_label": torch.tensor([0, 1, 0])} if name == "BertForPreTraining" else {}
    return values | {"labels": labels} | more


def logits_of(outputs):
    return outputs["prediction_logits"] if "prediction_logits" in outputs else outputs.get("logits")


@pytest.fixture(params=["BertForMaskedLM", "BertForPreTraining"])
def trained(request):
    nothing = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    patched, plain = pair(request.param, **nothing)
    return patched.train(), plain.train(), language_values(request.param)


def test_a_training_loss_and_its_gradients_are_transformers_without_logits(trained):
    patched, plain, values = trained
    outputs, expected = patched(**values), plain(**values)
    assert logits_of(outputs) is None
    assert type(outputs) is type(expected)
    torch.testing.assert_close(outputs.loss, expected.loss)
    outputs.loss.backward()
    expected.loss.backward()
    for (name, fused), hf in zip(patched.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(fused.grad, hf.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    as_tuple = patched(**values, return_dict=False)
    torch.testing.assert_close(as_tuple[0], expected.loss)


def watch_decoder(model):
    model.cls.predictions.decoder.register_forward_hook(lambda *_: None)


def watch_head(model):
    model.cls.register_forward_hook(lambda *_: None)


def watch_encoder(model):
    model.bert.register_forward_hook(lambda *_: None)


def watch_dense_of_transform(model):
    model.cls.predictions.transform.dense.register_forward_hook(lambda *_: None)


def request_logits(model):
    model.config.return_logits = True


@pytest.mark.parametrize(
    "change", [watch_decoder, watch_head, watch_encoder, watch_dense_of_transform, request_logits, nn.Module.eval]
)
def test_logits_are_computed_if_they_may_be_read(trained, change):
    patched, plain, values = trained
    change(patched)
    outputs, expected = patched(**values), plain(**values)
    torch.testing.assert_close(logits_of(outputs)[MASK], logits_of(expected)[MASK], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.loss, expected.loss)


class Smoothed(nn.CrossEntropyLoss):
    """A loss that a user puts in instead."""

    def __init__(self):
        super().__init__(label_smoothing=0.3)


@pytest.mark.parametrize("where", ["module", "class", "function"])
def test_a_replaced_cross_entropy_is_run(trained, where, monkeypatch):
    patched, plain, values = trained
    before = patched(**values).loss
    original = nn.functional.cross_entropy
    if where == "module":
        monkeypatch.setattr(modeling_bert, "CrossEntropyLoss", Smoothed)
    elif where == "class":
        monkeypatch.setattr(nn.CrossEntropyLoss, "forward", lambda self, x, labels: 2 * original(x, labels))
    else:
        monkeypatch.setattr(nn.functional, "cross_entropy", lambda *args, **options: 2 * original(*args, **options))
    loss = patched(**values).loss
    torch.testing.assert_close(loss, plain(**values).loss)
    assert not torch.allclose(loss, before)
    assert bertfast.report(patched).left[type(patched).__name__] == "PyTorch's cross entropy was replaced"


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_logits_are_computed_with_hidden_states_or_attentions(trained, asked):
    patched, plain, values = trained
    outputs, expected = patched(**values, **{asked: True}), plain(**values, **{asked: True})
    torch.testing.assert_close(logits_of(outputs)[MASK], logits_of(expected)[MASK], rtol=1e-4, atol=1e-5)
    assert len(outputs[asked.removeprefix("output_")]) == len(expected[asked.removeprefix("output_")])


def test_a_step_without_labels_has_a_loss_of_zero():
    patched, _ = pair("BertForMaskedLM")
    values = language_values("BertForMaskedLM") | {"labels": torch.full(MASK.shape, -100)}
    loss = patched.train()(**values).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in patched.parameters())


def test_labels_at_padding_count_in_training_as_in_evaluation():
    patched, _ = pair("BertForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    values = language_values("BertForMaskedLM")
    values["labels"] = values["input_ids"].clone()
    evaluated = patched(**values).loss
    torch.testing.assert_close(patched.train()(**values).loss, evaluated)


def test_a_step_of_several_batches_is_one_mean():
    patched, _ = pair("BertForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    values = language_values("BertForMaskedLM")
    whole = patched.train()(**values).loss
    count = (values["labels"] != -100).sum()
    parts = [
        patched(**{name: x[row : row + 1] for name, x in values.items()}, num_items_in_batch=count).loss
        for row in range(3)
    ]
    torch.testing.assert_close(sum(parts), whole)
    assert math.isfinite(whole)


@pytest.mark.parametrize(
    "misfit", [lambda ids: ids[:2], lambda ids: ids[:, :5].contiguous(), lambda ids: torch.full_like(ids, -1)]
)
def test_labels_that_do_not_fit_are_refused(misfit):
    model = bertfast.BertForMaskedLM(transformers.BertConfig(**SIZES)).train()
    with pytest.raises((ValueError, IndexError)):
        model(VALUES["input_ids"], VALUES["attention_mask"], labels=misfit(VALUES["input_ids"]))


@pytest.mark.parametrize("label", [-1, 60])
@pytest.mark.parametrize(
    ("name", "argument", "shape"),
    [
        ("BertForMaskedLM", "labels", (3, 11)),
        ("BertForPreTraining", "labels", (3, 11)),
        ("BertForPreTraining", "next_sentence_label", (3,)),
        ("BertForNextSentencePrediction", "labels", (3,)),
        ("BertForSequenceClassification", "labels", (3,)),
        ("BertForTokenClassification", "labels", (3, 11)),
        ("BertForMultipleChoice", "labels", (1,)),
    ],
)
def test_a_label_outside_its_range_is_refused_by_value(name, argument, shape, label):
    model = getattr(bertfast, name)(transformers.BertConfig(**SIZES | {"vocab_size": 53})).train()
    ids = torch.ones(*((1, 3, 11) if name == "BertForMultipleChoice" else (3, 11)), dtype=torch.long)
    labels = {"labels": torch.zeros(3, 11, dtype=torch.long), "next_sentence_label": torch.zeros(3, dtype=torch.long)}
    labels = labels if name == "BertForPreTraining" else {}
    values = torch.zeros(shape, dtype=torch.long)
    values.view(-1)[-1] = label
    with pytest.raises(IndexError, match=str(label)):
        model(ids, **labels | {argument: values})
