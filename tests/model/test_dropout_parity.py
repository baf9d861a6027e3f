"""In training mode, with bertfast's dropout masks in transformers, outputs, losses and gradients are the same."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from parity import CASES, CHOICES, PADDINGS, SIZES, Results, assert_parity, attended, double, inputs, models, results
from torch import Tensor

from bertfast.ops.dropout import RngCoordinates, attention_keep, draw_seed, hidden_keep

HIDDEN_P, ATTENTION_P = 0.2, 0.3
SEED = 7
POOLED = ("BertForSequenceClassification", "BertForMultipleChoice")
WITH_POOLER = (*POOLED, "BertModel", "BertForPreTraining", "BertForNextSentencePrediction")


def masks(case, mask: Tensor) -> Iterator[Tensor]:
    """Yield the factors of each dropout of transformers' model, in the order in which it calls them."""
    torch.manual_seed(SEED)
    seed = draw_seed(torch.device("cpu"))
    rows, columns = mask.shape
    position = (mask.cumsum(1) - 1).masked_fill(~mask, 0)
    query_only = (
        ~mask[:, 0] if case.class_name in WITH_POOLER and case.name != "no_pooler" else torch.zeros(rows).bool()
    )
    position[query_only, 0] = mask.sum(1)[query_only]  # a [CLS] that is masked out comes after the others
    number = torch.arange(rows)[:, None].expand_as(position)
    tokens = RngCoordinates(seed, number.flatten(), position.flatten())

    def hidden(p: float, site: str, layer: int | None = None) -> Tensor:
        dropout = tokens.dropout(p, site, layer)
        return (hidden_keep(dropout, SIZES["hidden_size"]) * dropout.scale).view(rows, columns, -1)

    def attention(layer: int) -> Tensor:
        dropout = tokens.dropout(ATTENTION_P, "attention", layer)
        heads = SIZES["num_attention_heads"]
        factors = torch.ones(rows, heads, columns, columns)
        for row in range(rows):
            keys = mask[row].nonzero().squeeze(1)
            queries = torch.cat([keys, torch.zeros(1, dtype=torch.int64)]) if query_only[row] else keys
            keep = attention_keep(dropout, row, heads, len(keys), range(len(queries)))
            factors[row][:, queries[:, None], keys] = keep * dropout.scale
        return factors

    yield hidden(HIDDEN_P, "embeddings")
    for layer in range(SIZES["num_hidden_layers"]):
        yield attention(layer)
        yield hidden(HIDDEN_P, "attention_output", layer)
        yield hidden(HIDDEN_P, "output", layer)


def with_dropout_masks(model, case, values, mask, monkeypatch) -> Results:
    """Return the results of transformers' model in training mode; `mask` is [rows, columns], one row per choice."""
    waiting = masks(case, mask)

    def dropout(x, p=0.5, training=True, inplace=False):
        return x * next(waiting).to(x.dtype) if p else x

    with monkeypatch.context() as patch:
        patch.setattr(F, "dropout", dropout)
        hf = results(model.train(), values, attended_outputs(case, mask))
    assert next(waiting, None) is None, "every mask is used"
    return hf


def attended_outputs(case, mask):
    return None if case.class_name == "BertForMultipleChoice" else mask


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("case", [case for case in CASES if not case.name.startswith("masked_lm_")], ids=str)
def test_parity_with_the_same_masks(case, padding, monkeypatch):
    fused, hf = models(
        case,
        hidden_dropout_prob=HIDDEN_P,
        attention_probs_dropout_prob=ATTENTION_P,
        classifier_dropout=0.0,  # a head's own dropout is PyTorch's; see tests/encoder/test_heads.py
    )
    values, mask = inputs(case, padding), attended(padding)
    if case.name == "question" and padding != "none":  # see test_parity
        values = {name: x for name, x in values.items() if not name.endswith("positions")}
    if case.class_name == "BertForMultipleChoice":
        mask = values["attention_mask"].flatten(0, 1).bool()
        assert len(mask) == CHOICES * len(values["labels"])
    fused.config.return_logits = True
    truth = with_dropout_masks(double(hf), case, values, mask, monkeypatch)
    their_results = with_dropout_masks(hf, case, values, mask, monkeypatch)
    torch.manual_seed(SEED)
    our_results = results(fused.train(), values, attended_outputs(case, mask))
    assert_parity(our_results, their_results, truth)

    if "labels" in values and "tokens" in case.targets and case.class_name != "BertLMHeadModel":
        # Without logits the loss is computed only on labelled rows.
        fused.config.return_logits = False
        torch.manual_seed(SEED)
        short = results(fused, values, attended_outputs(case, mask))
        assert "logits" not in short.outputs
        assert "prediction_logits" not in short.outputs
        for whole in (their_results, truth):
            for name in whole.outputs.keys() - short.outputs.keys():
                del whole.outputs[name]
        assert_parity(short, their_results, truth)


def test_dropout_is_off_in_evaluation_and_drawn_at_each_training_call():
    case = CASES[0]
    fused, _ = models(case)
    values = inputs(case, "right")
    assert torch.equal(fused(**values)[0], fused(**values)[0])
    fused.train()
    assert not torch.equal(fused(**values)[0], fused(**values)[0])
