"""Outputs, losses and every gradient of the other families' classes are those of transformers."""

from dataclasses import replace

import pytest
import torch
from family_models import CASES, PREFIXES, FamilyCase, inputs, no_dropout, pair, random_case
from parity import Results, assert_parity, double, results

import bertfast


def compared(
    case, train: bool, autocasts: tuple[bool, ...] = (False, True), leniency: float = 1, with_loss: bool = True
) -> None:
    """Compare a patched model with the same of transformers, in fp32 and under autocast.

    Without `with_loss` a loss is left out where there are logits: of many scalars some happen to have no rounding
    error in PyTorch.
    """
    patched, hf = pair(case, **no_dropout(case) if train else {})
    values, mask = inputs(case, hf)
    patched.train(train)
    hf.train(train)
    truth = results(double(hf), values, mask)
    for autocast in autocasts:
        found, expected = (results(model, values, mask, autocast) for model in (patched, hf))
        if train and case.task == "ForMaskedLM":
            assert found.outputs.keys() == {"loss"}
            expected = Results({"loss": expected.outputs["loss"]}, expected.gradients)
        if not with_loss and len(found.outputs) > 1:
            for each in (found, expected, truth):
                each.outputs.pop("loss", None)
        assert_parity(found, expected, truth, torch.bfloat16 if autocast else torch.float32, leniency)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, train):
    compared(case, train)


@pytest.mark.parametrize("case", [case for case in CASES if case.task in ("Model", "ForQuestionAnswering")], ids=str)
@pytest.mark.parametrize("kind", ["no padding", "embeddings", "padded by ids"])
def test_parity_of_other_calls(case, kind):
    changes = {
        "no padding": {"paddings": ("none",)},
        "embeddings": {"gives_embeddings": True},
        "padded by ids": {"pads_by_id": True},
    }
    compared(replace(case, **changes[kind]), train=False)


@pytest.mark.skipif("nomic_bert" not in PREFIXES, reason="this version of transformers has no NomicBERT")
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_parity_of_a_masked_lm_head_whose_activation_has_no_operator(train):
    case = FamilyCase("nomic_bert", "ForMaskedLM", {"hidden_act": "silu"}, leaves_transform=True)
    patched, _ = pair(case)
    (reason,) = bertfast.report(patched).left.values()
    assert "its activation is not GELU" in reason
    compared(case, train)  # in training the loss is computed without logits nevertheless


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(1, 100))])
@pytest.mark.parametrize("family", PREFIXES)
def test_parity_of_random_configurations(family, seed):
    case = random_case(family, seed)
    autocasts = (seed % 4 < 2 and not case.has_kinks,)
    compared(case, seed % 2 == 1, autocasts, leniency=2, with_loss=False)
