"""Outputs, losses and every gradient of the nine classes are those of `transformers`."""

import pytest
import torch
from helpers import relative_error
from parity import CASES, PADDINGS, assert_parity, attended, double, inputs, models, results


def question_softmax_is_shared(case, padding) -> bool:
    """Return whether both compute one loss: transformers' softmax over answers includes padding, bertfast's not."""
    return case.name != "question" or padding == "none"


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, padding):
    fused, hf = models(case)
    values, mask = inputs(case, padding), attended(padding)
    if not question_softmax_is_shared(case, padding):
        values = {name: x for name, x in values.items() if not name.endswith("positions")}
    truth = results(double(hf), values, mask)
    fused_fp32, hf_fp32 = (results(model, values, mask) for model in (fused, hf))
    assert_parity(fused_fp32, hf_fp32, truth)
    for name, x in fused_fp32.outputs.items():
        assert relative_error(x, hf_fp32.outputs[name]) < 2e-6, name
    fused_bf16, hf_bf16 = (results(model, values, mask, autocast=True) for model in (fused, hf))
    assert_parity(fused_bf16, hf_bf16, truth, torch.bfloat16)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameters_have_the_same_names_in_the_same_order(case):
    fused, hf = models(case)
    assert [(name, x.shape) for name, x in fused.state_dict().items()] == [
        (name, x.shape) for name, x in hf.state_dict().items()
    ]
    hf.load_state_dict(fused.state_dict(), strict=True)
