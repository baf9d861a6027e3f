"""Gradient penalties through patched models: second derivatives are those of transformers' eager attention."""

import copy

import pytest
import torch
from parity import CASES, Results, assert_parity, double, inputs, models
from torch import Tensor, nn

import bertfast

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def gradient_penalty(model: nn.Module, values: dict[str, Tensor]) -> Results:
    """Return the loss, its gradient with respect to word embeddings, and the gradients of that gradient's square."""
    model.zero_grad()
    values = dict(values)
    embeddings = model.get_input_embeddings()(values.pop("input_ids")).detach().requires_grad_()
    values = {name: x.to(embeddings.dtype) if x.is_floating_point() else x for name, x in values.items()}
    outputs = model(inputs_embeds=embeddings, **values)
    if "loss" in outputs:
        loss = outputs.loss
    else:  # at padding, hidden states of fused models are zero
        loss = (outputs.last_hidden_state * values["attention_mask"][..., None]).square().mean()
    (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
    penalty = gradient.square().sum()
    penalty.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Results({"loss": loss.detach(), "gradient": gradient.detach(), "penalty": penalty.detach()}, found)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gradient_penalty_is_that_of_transformers(case, train):
    _, hf = models(case, **NO_DROPOUT)
    hf.train(train)
    patched = copy.deepcopy(hf)
    assert [name for name in bertfast.patch(patched).fused if name.endswith("encoder.layer.1")]
    values = inputs(case, "none" if case.name == "question" else "right")
    truth = gradient_penalty(double(hf), values)
    assert truth.outputs["penalty"] > 0
    assert_parity(gradient_penalty(patched, values), gradient_penalty(hf, values), truth)
