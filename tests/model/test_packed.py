"""Packed input gives what padded input gives, and packing, neighbours and padding slots change nothing."""

import pytest
import torch
from parity import CASES, attended, inputs, models
from torch import Tensor

SENTENCE_TARGETS = ("next_sentence_label", "start_positions", "end_positions")


def packed(values: dict[str, Tensor], padding_slots: int = 0) -> tuple[dict, Tensor]:
    """Return the input without padding, with padding slots at its end, and the mask of tokens [rows, columns]."""
    flat = dict(values)
    mask = flat.pop("attention_mask").bool()
    lengths = mask.sum(1)
    result = {
        name: torch.cat([x[mask], torch.full((padding_slots,), -100 if name == "labels" else 1)])[None]
        if x.shape == mask.shape and name not in SENTENCE_TARGETS
        else x
        for name, x in flat.items()
    }
    result["cu_seq_lens_q"] = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    result["max_length_q"] = int(lengths.max())
    return result, mask


def gradients(model, outputs) -> dict[str, Tensor]:
    model.zero_grad()
    total = sum(x.square().sum() for x in outputs.values()) if outputs.get("loss") is None else outputs["loss"]
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padding_slots", [0, 5])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", [case for case in CASES if case.name != "choice"], ids=str)
def test_packed_is_padded(case, train, padding_slots):
    model, _ = models(case, max_position_embeddings=12, classifier_dropout=0.0)
    model.train(train)
    # PyTorch 2.10 cannot differentiate the regression loss of float64 labels.
    values = {name: x.float() if x.is_floating_point() else x for name, x in inputs(case, "right").items()}
    if case.class_name in ("BertForQuestionAnswering", "BertLMHeadModel"):  # transformers computes these losses by rows
        values = {name: x for name, x in values.items() if name not in ("labels", "start_positions", "end_positions")}
    model.config.use_cache = False
    without_padding, mask = packed(values, padding_slots)
    torch.manual_seed(3)
    padded_outputs = model(**values)
    torch.manual_seed(3)
    packed_outputs = model(**without_padding)
    assert padded_outputs.keys() == packed_outputs.keys()
    for name, x in padded_outputs.items():
        if x.shape[:2] == mask.shape:
            other = packed_outputs[name]
            assert other.shape == (1, mask.sum() + padding_slots, *x.shape[2:])
            torch.testing.assert_close(other[0, : mask.sum()], x[mask], msg=f"{name}: {{}}".format)
        else:
            torch.testing.assert_close(packed_outputs[name], x, msg=f"{name}: {{}}".format)
    if "loss" in padded_outputs:
        padded_gradients = gradients(model, padded_outputs)
        for name, x in gradients(model, packed_outputs).items():
            torch.testing.assert_close(x, padded_gradients[name], atol=1e-6, rtol=1e-4, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_neighbours_in_a_batch_change_nothing(train):
    model, _ = models(CASES[0])
    model.train(train)
    values = inputs(CASES[0], "right")
    others = {name: x.clone() for name, x in values.items()}
    others["input_ids"][1:] = 7
    outputs = []
    for given in (values, others):
        torch.manual_seed(3)
        outputs.append(model(**given))
    assert torch.equal(outputs[0].last_hidden_state[0], outputs[1].last_hidden_state[0])
    assert torch.equal(outputs[0].pooler_output[0], outputs[1].pooler_output[0])
    assert not torch.equal(outputs[0].pooler_output[1], outputs[1].pooler_output[1])


def test_padding_tokens_change_nothing_and_have_zero_hidden_states():
    model, _ = models(CASES[0])
    values, mask = inputs(CASES[0], "inside"), attended("inside")
    others = values | {"input_ids": values["input_ids"].masked_fill(~mask, 9)}
    first, second = (model(**given).last_hidden_state for given in (values, others))
    assert torch.equal(first, second)
    assert (first[~mask] == 0).all()


def test_wider_padding_changes_nothing():
    model, _ = models(CASES[0])
    values = inputs(CASES[0], "right")
    wider = {name: torch.nn.functional.pad(x, (0, 4)) for name, x in values.items()}
    assert torch.equal(model(**wider).last_hidden_state[:, :11], model(**values).last_hidden_state)


def test_a_row_without_tokens_is_finite_and_does_not_affect_others():
    case = next(case for case in CASES if case.name == "next_sentence")
    model, _ = models(case)
    values = inputs(case, "right")
    values["attention_mask"][1] = 0
    outputs = model(**values)
    assert outputs.logits.isfinite().all()
    assert all(x.isfinite().all() for x in gradients(model, outputs).values())
    alone = model(**{name: x[:1] for name, x in values.items()})
    torch.testing.assert_close(alone.logits, outputs.logits[:1])


def test_position_ids_and_token_type_ids_are_read():
    model, _ = models(CASES[0])
    values = inputs(CASES[0], "right")
    columns = values["input_ids"].shape[1]
    default = model(**values).last_hidden_state
    assert torch.equal(model(**values, position_ids=torch.arange(columns)[None]).last_hidden_state, default)
    assert not torch.equal(model(**values, position_ids=torch.arange(columns)[None] + 1).last_hidden_state, default)
    without = {name: x for name, x in values.items() if name != "token_type_ids"}
    zero = values | {"token_type_ids": torch.zeros_like(values["token_type_ids"])}
    assert torch.equal(model(**without).last_hidden_state, model(**zero).last_hidden_state)


def test_inputs_embeds_are_read():
    model, _ = models(CASES[0])
    values = inputs(CASES[0], "first")
    embedded = model.get_input_embeddings()(values["input_ids"])
    others = {name: x for name, x in values.items() if name != "input_ids"}
    torch.testing.assert_close(
        model(**others, inputs_embeds=embedded).last_hidden_state, model(**values).last_hidden_state
    )


def test_an_unmasked_batch_needs_no_mask():
    model, _ = models(CASES[0])
    values = inputs(CASES[0], "none")
    without = {name: x for name, x in values.items() if name != "attention_mask"}
    assert torch.equal(model(**without).last_hidden_state, model(**values).last_hidden_state)
