"""Who gets `num_items_in_batch`: heads divide by it only where their family's own loss runs."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from live_models import VALUES
from parity import SIZES
from transformers import Trainer, TrainingArguments

import bertfast
from bertfast.architectures import IS_TRANSFORMERS_4

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class OwnLoss:
    """A `forward` with a loss of its own, which is not the first of its outputs."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None, **options):
        self.items = num_items_in_batch
        outputs = super().forward(input_ids, attention_mask)
        total = F.cross_entropy(outputs.logits, labels, reduction="sum")
        loss = total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        return {"logits": outputs.logits, "loss": loss}


class Sum(OwnLoss, transformers.BertForSequenceClassification):
    """On transformers' class."""


class FusedSum(OwnLoss, bertfast.BertForSequenceClassification):
    """On the fused class."""


class Refusing(OwnLoss, transformers.BertForSequenceClassification):
    """One that requires its losses to be divided by the number of accumulated batches."""

    accepts_loss_kwargs = False


class WithoutKeywords(transformers.BertForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids, attention_mask, labels=labels)


class FusedWithoutKeywords(bertfast.BertForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids, attention_mask, labels=labels)


def make(kind):
    torch.manual_seed(0)
    return kind(transformers.BertConfig(**SIZES | NO_DROPOUT)).train()


@pytest.mark.parametrize("kind", [Sum, FusedSum, Refusing])
def test_a_users_forward_gets_the_number_of_items_and_its_loss_is_left_alone(kind):
    model = make(kind)
    values = {name: VALUES[name] for name in ("input_ids", "attention_mask", "labels")}
    expected = make(Sum)(**values, num_items_in_batch=torch.tensor(8))
    bertfast.patch(model)
    found = model(**values, num_items_in_batch=torch.tensor(8))
    assert model.items == 8
    torch.testing.assert_close(found["loss"], expected["loss"])
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "accepts"),
    [
        (transformers.BertForSequenceClassification, not IS_TRANSFORMERS_4),
        (transformers.BertForPreTraining, False),
        (Sum, True),
        (FusedSum, True),
        (Refusing, False),
        (WithoutKeywords, False),
        (FusedWithoutKeywords, False),
    ],
)
def test_trainer_is_told_what_the_class_takes(kind, accepts):
    model = make(kind)
    bertfast.patch(model)
    assert model.accepts_loss_kwargs is accepts


@pytest.mark.parametrize("as_tuple", [False, True])
def test_a_loss_of_transformers_is_divided_by_the_number_of_items(as_tuple):
    model = make(bertfast.BertForSequenceClassification)
    values = {**VALUES, "return_dict": not as_tuple}
    mean = model(**values)[0]
    total = model(**values, num_items_in_batch=6)[0]
    torch.testing.assert_close(total, mean * len(VALUES["labels"]) / 6)


@pytest.mark.parametrize("kind", [Sum, Refusing, WithoutKeywords, FusedWithoutKeywords])
def test_trainer_accumulates_a_users_loss_as_without_bertfast(kind, tmp_path):
    plain = {FusedWithoutKeywords: WithoutKeywords}.get(kind, kind)
    data = [{"input_ids": torch.arange(4, 10), "labels": index % 2} for index in range(8)]
    norms = []
    for model in (make(plain), make(kind)):
        if norms:
            bertfast.patch(model)
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=1,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
