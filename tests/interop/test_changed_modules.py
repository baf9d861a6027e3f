"""Hooks, adapters and other modules that users put around or into a patched model keep their effect."""

import pytest
import torch
from live_models import Doubled, batch, live, outputs_of, watch, watch_layer
from parity import SIZES
from torch import nn
from torch.nn.utils import parametrize
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

import bertfast
import bertfast.encoder.encode
import bertfast.models.fused

pytestmark = pytest.mark.usefixtures("small_batches_are_packed")


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def adapt(model):
    query = model.bert.encoder.layer[0].attention.self
    query.query = Doubled(query.query)


def watch_activation(model):
    activation = model.bert.encoder.layer[0].intermediate.intermediate_act_fn
    activation.register_forward_hook(lambda module, _, output: output * 2)


def watch_encoder(model):
    model.bert.encoder.register_forward_hook(lambda *_: None)


def watch_embeddings(model):
    model.bert.embeddings.register_forward_hook(lambda module, _, output: output * 0.5)


def reparametrise(model):
    parametrize.register_parametrization(model.bert.encoder.layer[1].output.dense, "weight", Twice())


def quantise(model):
    attention = model.bert.encoder.layer[0].attention
    attention.output = torch.ao.quantization.quantize_dynamic(attention.output, {nn.Linear}, dtype=torch.qint8)


def another_activation(model):
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()


def another_function_of_the_activation(model):
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn.act = torch.tanh


class TokenEmbeddings(nn.Embedding):
    def forward(self, input_ids=None, **others):
        return super().forward(input_ids)


def another_embeddings(model):
    torch.manual_seed(1)
    model.bert.embeddings = TokenEmbeddings(SIZES["vocab_size"], SIZES["hidden_size"])


def another_norm(model):
    model.bert.encoder.layer[0].output.LayerNorm = nn.Identity()


class LengthPooler(nn.Module):
    def forward(self, hidden):
        return hidden[:, 0] * hidden.shape[1]


def another_pooler(model):
    model.bert.pooler = LengthPooler()


def own_forward(model):
    dense = model.bert.encoder.layer[1].intermediate.dense
    dense.forward = lambda x: nn.functional.linear(x, dense.weight)


CHANGES = (
    adapt,
    watch,
    watch_activation,
    watch_layer,
    watch_encoder,
    watch_embeddings,
    reparametrise,
    quantise,
    another_activation,
    another_function_of_the_activation,
    another_embeddings,
    another_norm,
    own_forward,
    another_pooler,
)


@pytest.mark.filterwarnings("ignore")  # of quantisation, which is deprecated
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_module_keeps_its_effect(change, when):
    model, same = live(), live()
    if when == "after":
        bertfast.patch(model)
        outputs_of(model)  # what was decided then must not be reused
    change(model)
    change(same)
    if when == "before":
        bertfast.patch(model)
    expected = outputs_of(same, output_hidden_states=True)
    torch.testing.assert_close(outputs_of(model).logits, expected.logits, rtol=1e-4, atol=1e-5)
    got = outputs_of(model, output_hidden_states=True).hidden_states
    mask = batch()["attention_mask"].bool()
    for fused, hf in zip(got, expected.hidden_states, strict=True):
        torch.testing.assert_close(fused[mask], hf[mask], rtol=1e-4, atol=1e-5)


class OneLinear(nn.Module):
    """What a user may have instead of all layers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(SIZES["hidden_size"], SIZES["hidden_size"])

    def forward(self, hidden, *args, **options):
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.linear(hidden))


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_module_instead_of_the_layers_is_run_and_reported(when):
    model, same = live(), live()
    if when == "after":
        bertfast.patch(model)
        outputs_of(model)
    for changed in (model, same):
        torch.manual_seed(1)
        changed.bert.encoder = OneLinear()
    report = bertfast.patch(model)
    assert report.left["bert.encoder.layer"] == "it was replaced by another module"
    torch.testing.assert_close(outputs_of(model).logits, outputs_of(same).logits)


def test_a_hook_on_a_layer_gets_padded_hidden_states():
    model = live()
    bertfast.patch(model)
    seen = []

    def hook(module, arguments, output):
        seen.append((output[0] if isinstance(output, tuple) else output).shape)

    handle = model.bert.encoder.layer[0].register_forward_hook(hook)
    outputs_of(model)
    handle.remove()
    outputs_of(model)
    assert seen == [torch.Size([3, 11, SIZES["hidden_size"]])]


def test_calls_after_one_that_recorded_hidden_states_are_packed(monkeypatch):
    model = live()
    bertfast.patch(model)
    outputs_of(model, output_hidden_states=True)
    whole = []
    encode = bertfast.models.fused.functions.encode
    monkeypatch.setattr(bertfast.models.fused.functions, "encode", lambda *a: whole.append(1) or encode(*a))
    outputs_of(model)
    assert whole == [1]


def test_a_hook_on_the_encoder_of_a_head_gets_its_whole_output():
    model, plain = live(), live()
    bertfast.patch(model)
    seen = []
    for one in (model, plain):
        one.bert.register_forward_hook(lambda module, arguments, output: seen.append(output.last_hidden_state))
        outputs_of(one)
    mask = batch()["attention_mask"].bool()
    torch.testing.assert_close(seen[0][mask], seen[1][mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_a_dropout_in_another_mode_than_the_model_keeps_it(training):
    model = live(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)
    bertfast.patch(model)
    model.train(training)
    for dropout in (module for module in model.modules() if isinstance(module, nn.Dropout)):
        dropout.train(not training)
    first, second = outputs_of(model).logits, outputs_of(model).logits
    assert torch.equal(first, second) == training


def test_dropout_is_drawn_at_each_call_from_torchs_generator():
    model = live(hidden_dropout_prob=0.2).train()
    bertfast.patch(model)
    torch.manual_seed(5)
    first, second = outputs_of(model).logits, outputs_of(model).logits
    torch.manual_seed(5)
    assert not torch.equal(first, second)
    assert torch.equal(first, outputs_of(model).logits)


@pytest.mark.parametrize("watched", [False, True])
def test_without_dropout_training_leaves_torchs_generator_to_others(watched):
    """Shuffling and masking draw from it too, and must be the same as in a run with transformers."""
    model = live(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    bertfast.patch(model)
    if watched:
        watch_layer(model)
    before = torch.get_rng_state()
    outputs_of(model).loss.backward()
    assert torch.equal(torch.get_rng_state(), before)
