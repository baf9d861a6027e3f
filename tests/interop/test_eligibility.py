"""What runs packed is decided at each call: what users put around or into a module keeps its effect."""

import copy
import functools
import gc
import weakref

import pytest
import torch
import transformers
from live_models import MASK, VALUES, live, pair
from parity import SIZES
from torch import nn
from torch.nn.utils import prune, weight_norm
from transformers.activations import GELUActivation
from transformers.models.bert import modeling_bert

import bertfast
from bertfast.architectures import IS_TRANSFORMERS_4

is_5 = not IS_TRANSFORMERS_4


def assert_same(patched: nn.Module, plain: nn.Module, **more) -> None:
    torch.testing.assert_close(patched(**VALUES, **more).logits, plain(**VALUES, **more).logits, rtol=1e-4, atol=1e-5)


class Times:
    """A hook that is an object without a name."""

    def __call__(self, module, arguments, output):
        return output * 1.5


def times(factor, module, arguments, output):
    return output * factor


def hook_object(model):
    model.bert.encoder.layer[0].output.register_forward_hook(Times())


def hook_partial(model):
    model.bert.encoder.layer[0].output.register_forward_hook(functools.partial(times, 2))


def pruned(model):
    prune.l1_unstructured(model.bert.encoder.layer[1].intermediate.dense, "weight", 0.5)


@pytest.mark.filterwarnings("ignore")  # of its deprecation
def normed(model):
    weight_norm(model.bert.encoder.layer[1].output.dense)


def later_layer(model):
    torch.manual_seed(9)
    model.bert.encoder.layer[1] = modeling_bert.BertLayer(model.config, layer_idx=1).eval()


def more_layers(model):
    torch.manual_seed(9)
    model.bert.encoder.layer.append(modeling_bert.BertLayer(model.config, layer_idx=2).eval())
    model.config.num_hidden_layers = 3


def other_scale(model):
    for layer in model.bert.encoder.layer:
        layer.attention.self.scaling = 0.3


def without_bias(model):
    torch.manual_seed(9)
    model.bert.encoder.layer[0].intermediate.dense = nn.Linear(SIZES["hidden_size"], SIZES["intermediate_size"], False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "change",
    [hook_object, hook_partial, pruned, normed, later_layer, more_layers, without_bias]
    + ([other_scale] if is_5 else []),
)
def test_a_change_keeps_its_effect(change, when):
    patched, plain = live(), live()
    if when == "after":
        bertfast.patch(patched)
        patched(**VALUES)  # what was decided then must not be reused
    change(patched)
    change(plain)
    if when == "before":
        bertfast.patch(patched)
    assert_same(patched, plain)
    bertfast.report(patched)


def test_a_layer_that_was_put_in_is_reported_and_fused_by_patching_again():
    model = pair()[0]
    later_layer(model)
    assert bertfast.report(model).left == {
        "bert.encoder.layer.1": "it was put in after patching: patch the model again"
    }
    assert not bertfast.patch(model).left


@pytest.mark.filterwarnings("ignore")  # of quantisation, which is deprecated
def test_a_quantised_model_runs_in_inference():
    patched, plain = pair()
    patched, plain = (
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8) for model in (patched, plain)
    )
    with torch.no_grad():
        difference = (patched(**VALUES).logits - plain(**VALUES).logits).abs().max()
    assert difference < 0.05  # activations are quantised by their range, which includes padding


def test_a_dpr_encoder_has_the_same_output():
    config = transformers.DPRConfig(**{name: x for name, x in SIZES.items() if name != "num_labels"})
    torch.manual_seed(0)
    plain = transformers.DPRQuestionEncoder(config).eval()
    patched = copy.deepcopy(plain)
    bertfast.patch(patched)
    arguments = {"input_ids": VALUES["input_ids"], "attention_mask": VALUES["attention_mask"]}
    torch.testing.assert_close(patched(**arguments).pooler_output, plain(**arguments).pooler_output)


def nothing(module, query, key, value, mask, **options):
    """Return zeros as the output of attention."""
    return torch.zeros_like(query).transpose(1, 2), None


class Nothing:
    """The same as an object."""

    def __call__(self, *args, **options):
        return nothing(*args, **options)


@pytest.mark.skipif(not is_5, reason="before version 5 BERT resolves no attention function")
@pytest.mark.parametrize("how", ["own name", "known name", "eager", "object", "wrapper"])
def test_a_custom_attention_function_is_called(how, monkeypatch):
    patched, plain = pair()
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    if how == "eager":
        monkeypatch.setattr(modeling_bert, "eager_attention_forward", nothing)
    elif how == "known name":
        monkeypatch.setitem(functions._global_mapping, "sdpa", nothing)
        patched.set_attn_implementation("sdpa")
        plain.set_attn_implementation("sdpa")
    else:
        wrap = functools.wraps(functions["sdpa"])
        made = {"object": Nothing(), "wrapper": wrap(lambda *args, **options: nothing(*args, **options))}
        transformers.AttentionInterface.register("nothing", made.get(how, nothing))
        patched.set_attn_implementation("nothing")
        plain.set_attn_implementation("nothing")
    try:
        assert_same(patched, plain)
        reason = bertfast.report(patched).left["bert.encoder.layer.0"]
        name = {"object": "Nothing", "wrapper": "sdpa_attention_forward"}.get(how, "nothing")
        assert reason == f"its attention is {nothing.__module__}.{name}"
        if how != "eager":  # patched again, while the function is registered
            assert bertfast.patch(patched).left["bert.encoder.layer.0"] == reason
    finally:
        functions._global_mapping.pop("nothing", None)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", ["BertSelfOutput", "BertLayer", "BertEncoder", "BertModel", "BertEmbeddings"])
def test_a_forward_replaced_in_a_class_of_transformers_is_run(kind, wrapped, monkeypatch):
    patched, plain = pair()
    patched(**VALUES)
    forward, called = getattr(modeling_bert, kind).forward, []

    def replacement(self, *args, **kwargs):
        called.append(1)
        return forward(self, *args, **kwargs)

    replacement = functools.wraps(forward)(replacement) if wrapped else replacement
    monkeypatch.setattr(getattr(modeling_bert, kind), "forward", replacement)
    patched(**VALUES)
    fused = len(called)
    plain(**VALUES)
    assert len(called) == 2 * fused > 0


def test_dropout_follows_the_modules_and_not_the_configuration():
    patched, _ = pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    patched.train()
    patched.config.hidden_dropout_prob = 0.5
    torch.testing.assert_close(patched(**VALUES).logits, patched(**VALUES).logits)
    for path in ("embeddings.dropout", "encoder.layer.0.attention.output.dropout", "encoder.layer.1.output.dropout"):
        dropout = patched.bert.get_submodule(path)
        dropout.p = 0.5
        assert not torch.allclose(patched(**VALUES).logits, patched(**VALUES).logits), path
        assert not bertfast.report(patched).left
        dropout.p = 0.0


def test_is_decoder_may_change_after_patching():
    patched, plain = pair("BertLMHeadModel")
    ids = VALUES["input_ids"]
    for model in (patched, plain):
        model(ids)
        model.config.is_decoder, model.config.use_cache = True, False
    torch.testing.assert_close(patched(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    assert "is_decoder" in bertfast.report(patched).left["bert.encoder.layer.0"]


class _Halved(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) / 2


def _change_class(encoder: nn.Module) -> None:
    encoder.encoder.layer[0].output.LayerNorm.__class__ = _Halved


def _limit_norm(encoder: nn.Module) -> None:
    encoder.embeddings.word_embeddings.max_norm = 0.1


def _remove_bias(encoder: nn.Module) -> None:
    encoder.encoder.layer[0].output.LayerNorm.register_parameter("bias", None)


@pytest.mark.skipif(not is_5, reason="before version 5 an attention has no function")
def test_a_layer_with_another_configuration_runs_its_attention_function():
    patched, plain = pair()
    patched(**VALUES)
    transformers.AttentionInterface.register("nothing", nothing)
    try:
        for model in (patched, plain):
            config = copy.deepcopy(model.config)
            config._attn_implementation = "nothing"
            model.bert.encoder.layer[1].attention.self.config = config
        assert_same(patched, plain)
        assert [*bertfast.report(patched).left] == ["bert.encoder.layer.1"]
    finally:
        transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping.pop("nothing", None)


def _scale_feed_forward(encoder: nn.Module) -> None:
    layer = encoder.encoder.layer[0]
    original = layer.feed_forward_chunk
    layer.feed_forward_chunk = lambda x: original(x) / 2


@pytest.mark.parametrize("change", [_change_class, _limit_norm, _remove_bias, _scale_feed_forward])
def test_a_change_after_the_first_call_takes_effect(change):
    patched, plain = pair()
    patched(**VALUES)
    for model in (patched, plain):
        change(model.bert)
    torch.testing.assert_close(patched(**VALUES).logits, plain(**VALUES).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.Linear, nn.Embedding])
def test_a_replaced_forward_of_torch_is_called(kind, monkeypatch):
    patched, plain = pair()
    patched(**VALUES)
    calls, original = [], kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: calls.append(self) or original(self, x))
    plain(**VALUES)
    expected = len(calls)
    patched(**VALUES)
    assert len(calls) == 2 * expected


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_a_replaced_forward_of_an_activation_is_run(name, monkeypatch):
    patched, plain = pair(name)
    values = {key: x for key, x in VALUES.items() if key != "labels"}
    before = patched(**values).logits
    monkeypatch.setattr(GELUActivation, "forward", lambda self, x: x.relu())
    after, expected = patched(**values).logits, plain(**values).logits
    rows = MASK if after.dim() == 3 else slice(None)
    torch.testing.assert_close(after[rows], expected[rows])
    assert not torch.allclose(after, before)
    left = bertfast.report(patched).left
    replaced = {path for path, reason in left.items() if reason == "the forward of GELUActivation was replaced"}
    transforms = {"cls.predictions.transform"} if name == "BertForMaskedLM" else set()
    assert replaced >= {"bert.encoder.layer.0"} | transforms


def test_a_model_is_freed_after_its_calls():
    model = bertfast.BertModel(transformers.BertConfig(**SIZES)).eval()
    model(VALUES["input_ids"], VALUES["attention_mask"])
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def _shift_positions(embeddings: nn.Module) -> None:
    embeddings.position_ids = (embeddings.position_ids + 2).clamp(max=15)


def _fill_token_types(embeddings: nn.Module) -> None:
    embeddings.token_type_ids.fill_(1)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [_shift_positions, _fill_token_types])
def test_changed_default_positions_and_token_types_are_used(change, when):
    patched, plain = pair()
    ids, mask = VALUES["input_ids"], VALUES["attention_mask"]
    if when == "after":
        patched(ids, mask)
    for model in (patched, plain):
        change(model.bert.embeddings)
    torch.testing.assert_close(patched(ids, mask).logits, plain(ids, mask).logits, rtol=1e-4, atol=1e-5)
    assert "its buffer" in bertfast.report(patched).left["bert.embeddings"]


def test_a_model_made_in_inference_mode_is_examined_once(monkeypatch):
    with torch.inference_mode():
        patched, plain = pair()
        assert_same(patched, plain)
        monkeypatch.setattr("bertfast.models.eligibility.unsupported_reasons", lambda encoder: pytest.fail("again"))
        assert_same(patched, plain)


def test_buffers_made_in_inference_mode_are_compared_at_each_call():
    """PyTorch does not count writes to them."""
    with torch.inference_mode():
        patched, plain = pair()
        assert_same(patched, plain)
        ids, mask = VALUES["input_ids"], VALUES["attention_mask"]
        for model in (patched, plain):
            _fill_token_types(model.bert.embeddings)
        torch.testing.assert_close(patched(ids, mask).logits, plain(ids, mask).logits, rtol=1e-4, atol=1e-5)


def test_a_function_as_activation_runs_transformers_own_code():
    patched, plain = pair()
    for model in (patched, plain):
        del model.bert.encoder.layer[0].intermediate.intermediate_act_fn
        model.bert.encoder.layer[0].intermediate.intermediate_act_fn = torch.sin
    assert_same(patched, plain)
    assert bertfast.report(patched).left["bert.encoder.layer.0"] == "its activation is sin"
