"""What comes back can be had by attribute, key and position; records of states and attentions are Hugging Face's."""

import pytest
import torch
from parity import CASES, PADDINGS, attended, inputs, models

from bertfast.outputs import HeadOutput

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attribute_key_and_tuple_are_one(case):
    ours, theirs = models(case)
    values = inputs(case, "none")
    outputs, expected = ours(**values), theirs(**values)
    assert list(outputs.keys()) == list(expected.keys())
    as_tuple = ours(**values, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(outputs) == len(outputs.to_tuple()) == len(expected)
    for place, name in enumerate(outputs):
        assert outputs[place] is outputs[name]
        assert getattr(outputs, name) is outputs[name]
        assert torch.equal(as_tuple[place], outputs[place])
    assert outputs.hidden_states is None
    with pytest.raises(KeyError):
        outputs["hidden_states"]


def test_outputs_can_be_changed_by_attribute_and_by_key():
    outputs = HeadOutput(logits=torch.zeros(2))
    outputs["logits"] = torch.ones(2)
    assert torch.equal(outputs.logits, torch.ones(2))
    outputs.logits = torch.full((2,), 3.0)
    assert torch.equal(outputs[0], torch.full((2,), 3.0))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ["model", "causal", "sequence", "pretraining", "token"])
def test_hidden_states_and_attentions_are_theirs(name, padding):
    case = BY_NAME[name]
    ours, theirs = models(case)
    values, mask = inputs(case, padding), attended(padding)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    outputs, expected = ours(**values, **wanted), theirs(**values, **wanted)
    assert list(outputs.keys()) == [key for key in expected if key != "cross_attentions"]
    assert len(outputs.hidden_states) == len(expected.hidden_states) == 3
    for state, other in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state[mask], other[mask], atol=1e-5, rtol=1e-5)
    assert len(outputs.attentions) == len(expected.attentions) == 2
    pairs = (mask[:, :, None] & mask[:, None, :])[:, None]
    for attention, other in zip(outputs.attentions, expected.attentions, strict=True):
        assert attention.shape == other.shape
        torch.testing.assert_close(attention * pairs, other * pairs, atol=1e-6, rtol=1e-5)
    plain = ours(**values)
    for key in plain:
        torch.testing.assert_close(outputs[key], plain[key])


def test_config_asks_for_records_too():
    ours, _ = models(BY_NAME["token"], output_hidden_states=True)
    values = inputs(BY_NAME["token"], "none")
    assert len(ours(**values).hidden_states) == 3
    assert ours(**values).attentions is None
    assert ours(**values, output_hidden_states=False).hidden_states is None


def test_loss_is_over_the_items_that_the_caller_counts():
    for name in ("masked_lm", "token", "sequence", "choice", "next_sentence", "regression"):
        case = BY_NAME[name]
        ours, _ = models(case)
        values = inputs(case, "none")
        count = int((values["labels"] != -100).sum())
        torch.testing.assert_close(ours(**values, num_items_in_batch=2 * count).loss, ours(**values).loss / 2)
        assert ours.accepts_loss_kwargs
    assert not models(BY_NAME["pretraining"])[0].accepts_loss_kwargs


@pytest.mark.parametrize("train", [False, True])
def test_no_label_at_all_is_no_loss_and_no_gradient(train):
    for name in ("masked_lm", "token", "causal"):
        ours, _ = models(BY_NAME[name])
        values = inputs(BY_NAME[name], "right")
        loss = ours.train(train)(**values | {"labels": torch.full_like(values["labels"], -100)}).loss
        loss.backward()
        assert loss.item() == 0
        assert all((p.grad == 0).all() for p in ours.parameters() if p.grad is not None)


def test_problem_type_follows_the_first_labels():
    expected = {"sequence": "single_label_classification", "multi_label": "multi_label_classification"}
    for name, problem in (expected | {"regression": "regression"}).items():
        ours, _ = models(BY_NAME[name])
        ours(**{n: x.float() if x.is_floating_point() else x for n, x in inputs(BY_NAME[name], "none").items()})
        assert ours.config.problem_type == problem


def test_answers_are_sought_among_tokens_alone():
    """Hugging Face's softmax counts padding in, so its loss grows with the width of the batch; ours does not."""
    case = BY_NAME["question"]
    ours, theirs = models(case)
    values = inputs(case, "right")
    values["start_positions"], values["end_positions"] = torch.tensor([2, 0, 0]), torch.tensor([6, 1, 0])
    short = {name: x[:, :11] if x.dim() == 2 else x for name, x in values.items()}
    wider = {name: torch.nn.functional.pad(x, (0, 4)) if x.dim() == 2 else x for name, x in values.items()}
    torch.testing.assert_close(ours(**wider).loss, ours(**short).loss)
    assert theirs(**wider).loss > theirs(**short).loss
    rows = [
        {
            name: x[i : i + 1, : 7 if x.dim() == 2 and not i else None] if x.dim() == 2 else x[i : i + 1]
            for name, x in short.items()
        }
        for i in (0, 1)
    ]
    alone = torch.stack([theirs(**row).loss for row in rows])
    both = ours(**{name: x[:2] for name, x in short.items()}).loss
    torch.testing.assert_close(both, alone.mean())


@pytest.mark.parametrize(("dtype", "loss_dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
@pytest.mark.parametrize("case", [case for case in CASES if case.targets], ids=str)
def test_losses_are_single_precision_at_least(case, dtype, loss_dtype):
    ours = models(case)[0].to(dtype).train()
    outputs = ours(**inputs(case, "right"))
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert outputs.loss.dtype == loss_dtype
