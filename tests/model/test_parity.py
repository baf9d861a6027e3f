"""Outputs, losses and every gradient of the nine classes are those of `transformers`."""

import pytest
import torch
from helpers import relative_error
from parity import CASES, PADDINGS, assert_parity, attended, double, inputs, models, results


def question_softmax_is_shared(case, padding) -> bool:
    """Hugging Face's softmax over answers counts padding in and ours does not: no common loss where there is some."""
    return case.name != "question" or padding == "none"


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, padding):
    ours, theirs = models(case)
    values, mask = inputs(case, padding), attended(padding)
    if not question_softmax_is_shared(case, padding):
        values = {name: x for name, x in values.items() if not name.endswith("positions")}
    truth = results(double(theirs), values, mask)
    ours_32, theirs_32 = (results(model, values, mask) for model in (ours, theirs))
    assert_parity(ours_32, theirs_32, truth)
    for name, x in ours_32.outputs.items():
        assert relative_error(x, theirs_32.outputs[name]) < 2e-6, name
    ours_16, theirs_16 = (results(model, values, mask, autocast=True) for model in (ours, theirs))
    assert_parity(ours_16, theirs_16, truth, torch.bfloat16)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameters_have_the_same_names_in_the_same_order(case):
    ours, theirs = models(case)
    assert [(name, x.shape) for name, x in ours.state_dict().items()] == [
        (name, x.shape) for name, x in theirs.state_dict().items()
    ]
    theirs.load_state_dict(ours.state_dict(), strict=True)
