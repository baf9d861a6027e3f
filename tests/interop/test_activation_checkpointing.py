"""Layers that are recomputed in the backward pass, and hidden states that are recorded."""

import pytest
import torch
from helpers import relative_error
from live_models import batch, live, outputs_of, watch_layer

import bertfast
import bertfast.encoder.encode
import bertfast.models.fused

pytestmark = pytest.mark.usefixtures("small_batches_are_packed")


@pytest.mark.filterwarnings("ignore")  # of names that version 5 has renamed
@pytest.mark.parametrize("change", [None, watch_layer])
def test_activation_checkpointing_changes_no_gradient(change):
    gradients = []
    for checkpointed in (False, True):
        model = live(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        bertfast.patch(model)
        if change is not None:
            change(model)
        if checkpointed:
            model.gradient_checkpointing_enable()
        outputs_of(model).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)


def test_recomputed_layers_with_hidden_states_change_no_gradient():
    """transformers' own loop records the states, and its layers are recomputed after the call."""
    gradients = []
    for checkpointed in (False, True):
        model = live(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        bertfast.patch(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        outputs_of(model, output_hidden_states=True).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)


def test_recomputed_layers_have_the_same_dropout():
    gradients = []
    for checkpointed in (False, True):
        model = live(hidden_dropout_prob=0.3).train()
        bertfast.patch(model)
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(7)
        outputs_of(model).loss.backward()
        gradients.append(model.bert.encoder.layer[0].attention.self.query.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_have_bitwise_identical_gradients_under_autocast(reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = live().train()
        bertfast.patch(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16):
            loss = outputs_of(model).loss
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("watched", [False, True])
def test_hidden_states_under_autocast_are_the_fp32_stream(watched):
    """They are recorded in transformers' loop, in which a hooked layer runs transformers' own code."""
    states = []
    for patched in (False, True):
        model = live(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        if patched:
            bertfast.patch(model)
        if watched:
            model.bert.encoder.layer[1].intermediate.register_forward_hook(lambda module, _, output: output * 1.5)
        with torch.autocast("cpu", torch.bfloat16):
            states.append(outputs_of(model, output_hidden_states=True).hidden_states)
    mask = batch()["attention_mask"].bool()
    for own, fused in zip(*states, strict=True):
        assert fused.dtype == own.dtype == torch.float32
        assert relative_error(fused[mask], own[mask]) < 0.02
