"""What runs packed is decided at each call: whatever has been put around or into a module keeps its effect."""

import copy
import functools
import gc
import math
import weakref

import pytest
import torch
import transformers
from parity import CASES as PARITY_CASES
from parity import SIZES, inputs
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune, weight_norm
from transformers.models.bert import modeling_bert

import bertfast

VALUES = inputs(next(case for case in PARITY_CASES if case.name == "sequence"), "right")
MASK = VALUES["attention_mask"].bool()
is_5 = transformers.__version__ >= "5"


def live(name="BertForSequenceClassification", **changes) -> nn.Module:
    torch.manual_seed(0)
    config = {"attn_implementation": "eager"} | SIZES | changes
    return getattr(transformers, name)(transformers.BertConfig(**config)).eval()


def pair(name="BertForSequenceClassification", **changes) -> tuple[nn.Module, nn.Module]:
    """A patched model and the same as it was."""
    plain = live(name, **changes)
    patched = copy.deepcopy(plain)
    bertfast.patch(patched)
    return patched, plain


def assert_same(patched: nn.Module, plain: nn.Module, **more) -> None:
    torch.testing.assert_close(patched(**VALUES, **more).logits, plain(**VALUES, **more).logits, rtol=1e-4, atol=1e-5)


class Times:
    """A hook that is an object, and has no name."""

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
        patched(**VALUES)  # what was found then must not be believed
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
def test_a_quantised_model_runs_without_gradients():
    patched, plain = pair()
    patched, plain = (
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8) for model in (patched, plain)
    )
    with torch.no_grad():
        difference = (patched(**VALUES).logits - plain(**VALUES).logits).abs().max()
    assert difference < 0.05  # activations are quantised by their range, which padding takes part in


def test_a_dpr_encoder_gives_what_it_gave():
    config = transformers.DPRConfig(**{name: x for name, x in SIZES.items() if name != "num_labels"})
    torch.manual_seed(0)
    plain = transformers.DPRQuestionEncoder(config).eval()
    patched = copy.deepcopy(plain)
    bertfast.patch(patched)
    arguments = {"input_ids": VALUES["input_ids"], "attention_mask": VALUES["attention_mask"]}
    torch.testing.assert_close(patched(**arguments).pooler_output, plain(**arguments).pooler_output)


def nothing(module, query, key, value, mask, **options):
    """An attention that gives zero."""
    return torch.zeros_like(query).transpose(1, 2), None


@pytest.mark.skipif(not is_5, reason="before version 5 BERT resolves no attention function")
@pytest.mark.parametrize("how", ["own name", "known name", "eager"])
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
        transformers.AttentionInterface.register("nothing", nothing)
        patched.set_attn_implementation("nothing")
        plain.set_attn_implementation("nothing")
    try:
        assert_same(patched, plain)
        reason = bertfast.report(patched).left["bert.encoder.layer.0"]
        assert reason == f"its attention is {nothing.__module__}.nothing"
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
    ours = len(called)
    plain(**VALUES)
    assert len(called) == 2 * ours > 0


def test_dropout_follows_the_modules_and_not_the_configuration():
    patched, _ = pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    patched.train()
    patched.config.hidden_dropout_prob = 0.5
    torch.testing.assert_close(patched(**VALUES).logits, patched(**VALUES).logits)
    for place in ("embeddings.dropout", "encoder.layer.0.attention.output.dropout", "encoder.layer.1.output.dropout"):
        dropout = patched.bert.get_submodule(place)
        dropout.p = 0.5
        assert not torch.allclose(patched(**VALUES).logits, patched(**VALUES).logits), place
        assert not bertfast.report(patched).left
        dropout.p = 0.0


def test_shapes_that_broadcast_in_transformers_are_taken():
    patched, plain = pair()
    ids, types = VALUES["input_ids"], VALUES["token_type_ids"]
    row = torch.tensor([[1] * 8 + [0] * 3])
    positions, compared = torch.arange(11).flip(0), 0
    for arguments in (
        {"attention_mask": row},
        {"position_ids": positions[None]},
        {"position_ids": positions},
        {"token_type_ids": types[:1]},
        {"attention_mask": torch.cat([VALUES["attention_mask"], torch.ones(3, 4)], 1)},
        {"attention_mask": VALUES["attention_mask"][:, :9]},
        {"attention_mask": VALUES["attention_mask"].bool()},
        {"attention_mask": VALUES["attention_mask"].float()},
    ):
        arguments = {"input_ids": ids, "token_type_ids": types} | arguments
        try:
            want = plain(**arguments).logits
        except (IndexError, RuntimeError):  # not every version takes all of them
            with pytest.raises((IndexError, RuntimeError)):
                patched(**arguments)
            continue
        torch.testing.assert_close(patched(**arguments).logits, want, rtol=1e-4, atol=1e-5)
        compared += 1
    assert compared >= 5


def test_torch_func_differentiates_what_transformers_computes():
    patched, plain = pair(num_hidden_layers=1)
    labels = torch.tensor([0, 1, 2])

    def gradients(model):
        parameters = dict(model.named_parameters())
        arguments = {**VALUES, "labels": labels}
        return torch.func.grad(lambda p: torch.func.functional_call(model, p, (), arguments).loss)(parameters)

    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(patched)[name], gradient, rtol=1e-4, atol=1e-6)


def test_tensors_without_values_have_the_shapes_of_transformers():
    patched, plain = pair()
    ids = VALUES["input_ids"]
    try:
        want = plain.to("meta")(ids.to("meta")).logits.shape
    except RuntimeError as error:  # not every version takes them
        pytest.skip(f"transformers {transformers.__version__}: {error}")
    assert patched.to("meta")(ids.to("meta")).logits.shape == want
    with FakeTensorMode():
        fake = live()
        bertfast.patch(fake)
        assert fake(torch.zeros(3, 11, dtype=torch.int64)).logits.shape == (3, 3)


def test_a_model_that_becomes_a_decoder_later_is_one():
    patched, plain = pair("BertLMHeadModel")
    ids = VALUES["input_ids"]
    for model in (patched, plain):
        model(ids)
        model.config.is_decoder, model.config.use_cache = True, False
    torch.testing.assert_close(patched(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    assert "is_decoder" in bertfast.report(patched).left["bert.encoder.layer.0"]


def test_a_choice_of_hidden_states_by_index_is_kept():
    patched, plain = pair()
    try:
        want = plain(**VALUES, output_hidden_states=0).hidden_states
    except Exception as error:  # not every version has it
        pytest.skip(f"transformers {transformers.__version__}: {error}")
    got = patched(**VALUES, output_hidden_states=0).hidden_states
    assert (got is None) == (want is None)
    for ours, theirs in zip(got or (), want or (), strict=True):
        assert (ours is None) == (theirs is None)


# The loss of heads with a vocabulary.


def language_values(name: str) -> dict[str, torch.Tensor]:
    values = {name: x for name, x in VALUES.items() if name != "labels"}
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(53, MASK.shape, generator=generator)
    labels = labels.masked_fill((torch.rand(MASK.shape, generator=generator) < 0.6) | ~MASK, -100)
    more = {"next_sentence_label": torch.tensor([0, 1, 0])} if name == "BertForPreTraining" else {}
    return values | {"labels": labels} | more


def logits_of(outputs):
    return outputs["prediction_logits"] if "prediction_logits" in outputs else outputs.get("logits")


@pytest.fixture(params=["BertForMaskedLM", "BertForPreTraining"])
def trained(request):
    nothing = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    patched, plain = pair(request.param, **nothing)
    return patched.train(), plain.train(), language_values(request.param)


def test_a_training_loss_and_its_gradients_are_transformers_without_logits(trained):
    patched, plain, values = trained
    outputs, want = patched(**values), plain(**values)
    assert logits_of(outputs) is None
    assert type(outputs) is type(want)
    torch.testing.assert_close(outputs.loss, want.loss)
    outputs.loss.backward()
    want.loss.backward()
    for (name, ours), theirs in zip(patched.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
    as_tuple = patched(**values, return_dict=False)
    torch.testing.assert_close(as_tuple[0], want.loss)


def watch_decoder(model):
    model.cls.predictions.decoder.register_forward_hook(lambda *_: None)


def watch_head(model):
    model.cls.register_forward_hook(lambda *_: None)


def watch_encoder(model):
    model.bert.register_forward_hook(lambda *_: None)


def want_logits(model):
    model.config.return_logits = True


@pytest.mark.parametrize("change", [watch_decoder, watch_head, watch_encoder, want_logits, nn.Module.eval])
def test_logits_are_there_where_someone_may_read_them(trained, change):
    patched, plain, values = trained
    change(patched)
    outputs, want = patched(**values), plain(**values)
    torch.testing.assert_close(logits_of(outputs)[MASK], logits_of(want)[MASK], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.loss, want.loss)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_logits_are_there_where_records_are_asked_for(trained, asked):
    patched, plain, values = trained
    outputs, want = patched(**values, **{asked: True}), plain(**values, **{asked: True})
    torch.testing.assert_close(logits_of(outputs)[MASK], logits_of(want)[MASK], rtol=1e-4, atol=1e-5)
    assert len(outputs[asked.removeprefix("output_")]) == len(want[asked.removeprefix("output_")])


def test_a_step_without_labels_has_a_loss_of_zero():
    patched, _ = pair("BertForMaskedLM")
    values = language_values("BertForMaskedLM") | {"labels": torch.full(MASK.shape, -100)}
    loss = patched.train()(**values).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in patched.parameters())


def test_labels_at_padding_count_in_training_as_in_evaluation():
    patched, _ = pair("BertForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    values = language_values("BertForMaskedLM")
    values["labels"] = values["input_ids"].clone()
    evaluated = patched(**values).loss
    torch.testing.assert_close(patched.train()(**values).loss, evaluated)


def test_a_step_of_several_batches_is_one_mean():
    patched, _ = pair("BertForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    values = language_values("BertForMaskedLM")
    whole = patched.train()(**values).loss
    count = (values["labels"] != -100).sum()
    parts = [
        patched(**{name: x[row : row + 1] for name, x in values.items()}, num_items_in_batch=count).loss
        for row in range(3)
    ]
    torch.testing.assert_close(sum(parts), whole)
    assert math.isfinite(whole)


class _Halved(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) / 2


def _change_class(encoder: nn.Module) -> None:
    encoder.encoder.layer[0].output.LayerNorm.__class__ = _Halved


def _limit_norm(encoder: nn.Module) -> None:
    encoder.embeddings.word_embeddings.max_norm = 0.1


def _remove_bias(encoder: nn.Module) -> None:
    encoder.encoder.layer[0].output.LayerNorm.register_parameter("bias", None)


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


def test_hooks_for_all_modules_are_called_as_often():
    patched, plain = pair()
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    try:
        plain(**VALUES)
        expected = len(calls)
        patched(**VALUES)
    finally:
        handle.remove()
    assert calls[:expected] == calls[expected:]


@pytest.mark.parametrize(
    "misfit", [lambda ids: ids[:2], lambda ids: ids[:, :5].contiguous(), lambda ids: torch.full_like(ids, -1)]
)
def test_labels_that_do_not_fit_are_refused(misfit):
    model = bertfast.BertForMaskedLM(transformers.BertConfig(**SIZES)).train()
    with pytest.raises((ValueError, IndexError)):
        model(VALUES["input_ids"], VALUES["attention_mask"], labels=misfit(VALUES["input_ids"]))


def test_packed_input_whose_keys_are_other_sequences_is_refused():
    model = bertfast.BertModel(transformers.BertConfig(**SIZES)).eval()
    ids, starts = torch.tensor([[2, 5, 3, 2, 6, 3]]), torch.tensor([0, 3, 6])
    with pytest.raises(ValueError, match="cu_seq_lens_k without cu_seq_lens_q: pass both"):
        model(ids, cu_seq_lens_k=starts)
    with pytest.raises(ValueError, match="a cu_seq_lens_k other than its cu_seq_lens_q: pass the same for both"):
        model(ids, cu_seq_lens_q=starts, cu_seq_lens_k=torch.tensor([0, 2, 6]))


def test_a_model_is_freed_after_its_calls():
    model = bertfast.BertModel(transformers.BertConfig(**SIZES)).eval()
    model(VALUES["input_ids"], VALUES["attention_mask"])
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
