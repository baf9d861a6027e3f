"""`bertfast.patch`: live models of `transformers` give what they gave, and are what they were after `unpatch`."""

import copy
import pickle
import random
import re

import pytest
import torch
import transformers
from helpers import relative_error
from parity import CASES, PADDINGS, SIZES, assert_parity, attended, double, inputs, models, results
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import bertfast
import bertfast.models.fused
from bertfast.encoder import kernel_support
from bertfast.models import fused
from bertfast.ops import native
from bertfast.ops.attention import HEAD_DIMENSIONS

SEQUENCE = next(case for case in CASES if case.name == "sequence")


@pytest.fixture(autouse=True)
def _small_batches_are_packed(monkeypatch):
    """Also without the compiled library and with heads of other sizes, where they would be left to transformers."""
    monkeypatch.setattr(kernel_support, "MIN_SLOTS", 0)
    monkeypatch.setattr(kernel_support, "MIN_COLUMNS", 0)
    monkeypatch.setattr(kernel_support, "HEAD_DIMENSIONS", range(1, 129))


def live(name="BertForSequenceClassification", *, seed=0, **changes) -> nn.Module:
    """A model of `transformers` with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(**SIZES | changes)
    return getattr(transformers, name)(config).eval()


def batch(padding="right") -> dict[str, torch.Tensor]:
    return inputs(SEQUENCE, padding)


def outputs_of(model, **more):
    return model(**batch(), **more)


def without_padding_in_a_softmax(case, padding, values):
    """Their softmax over the places of an answer counts padding in, whose logits are of no use to anyone."""
    if case.name == "question" and padding != "none":
        return {name: x for name, x in values.items() if not name.endswith("positions")}
    return values


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, padding):
    _, theirs = models(case)
    patched = copy.deepcopy(theirs)
    bertfast.patch(patched)
    values, mask = without_padding_in_a_softmax(case, padding, inputs(case, padding)), attended(padding)
    truth = results(double(theirs), values, mask)
    assert_parity(results(patched, values, mask), results(theirs, values, mask), truth)
    assert_parity(
        results(patched, values, mask, autocast=True),
        results(theirs, values, mask, autocast=True),
        truth,
        torch.bfloat16,
    )


@pytest.mark.parametrize("seed", range(100))
def test_outputs_at_attended_places_stay_whatever_the_configuration(seed):
    chance = random.Random(seed)
    case, heads, head_dimension = chance.choice(CASES), chance.randint(1, 4), chance.choice([4, 8, 16, 20, 32, 64])
    changes = {
        "num_attention_heads": heads,
        "hidden_size": heads * head_dimension,
        "intermediate_size": chance.randint(1, 80),
        "num_hidden_layers": chance.randint(0, 3),
        "hidden_act": chance.choice(["gelu", "gelu_new", "relu", "silu", "tanh", "mish"]),
        "hidden_dropout_prob": chance.choice([0.0, 0.1]),
        "tie_word_embeddings": chance.random() < 0.5,
        "type_vocab_size": chance.choice([2, 5]),
        "layer_norm_eps": chance.choice([1e-12, 1e-5]),
        "use_cache": False,
    }
    torch.manual_seed(seed)
    config = transformers.BertConfig(**SIZES | case.changes | changes, attn_implementation="eager")
    theirs = getattr(transformers, case.class_name)(config, **case.arguments).eval()
    patched = copy.deepcopy(theirs)
    bertfast.patch(patched)
    rows, columns = chance.randint(1, 4), chance.randint(1, 16)
    lengths = torch.tensor([[chance.randint(0, columns)] for _ in range(rows)])
    mask = {
        "right": torch.arange(columns) < lengths,
        "left": torch.arange(columns) >= lengths,
        "inside": torch.rand(rows, columns) < 0.6,
        "none": torch.ones(rows, columns, dtype=torch.bool),
    }[chance.choice(["right", "left", "inside", "none"])]
    choices = (2,) if case.class_name == "BertForMultipleChoice" else ()
    values = {
        "input_ids": torch.randint(SIZES["vocab_size"], (rows, *choices, columns)),
        "token_type_ids": torch.randint(config.type_vocab_size, (rows, *choices, columns)),
        "attention_mask": (mask[:, None].repeat(1, 2, 1) if choices else mask).long(),
    }
    with torch.no_grad():
        ours, plain, truth = (dict(model(**values).items()) for model in (patched, theirs, double(theirs)))
    assert ours.keys() == plain.keys()
    of_rows = (
        "pooler_output",
        "seq_relationship_logits",
        *(["logits"] if truth.get("logits", mask).dim() == 2 else []),
    )
    for name, true in truth.items():
        # Where a row attends to nothing, their softmax runs over its padding.
        read = mask.any(1) if name in of_rows else mask
        if read.any():
            error, allowed = (relative_error(x[name][read].double(), true[read]) for x in (ours, plain))
            assert error <= 4 * allowed + 1e-6, f"{name}: {error:.3g}, theirs {allowed:.3g}"


def test_what_happens_is_reported():
    model = live("BertForMaskedLM", num_hidden_layers=3)
    layers = model.bert.encoder.layer
    layers[0].attention.self.query = Doubled(layers[0].attention.self.query)
    layers[1].register_forward_hook(lambda *_: None)
    layers[1].output.dense.register_forward_hook(lambda *_: None)
    layers[2].intermediate.intermediate_act_fn = nn.Mish()
    report = bertfast.patch(model)
    assert set(report.fused) == {
        "BertForMaskedLM",
        "bert.embeddings",
        "bert.encoder.layer.0",
        "cls.predictions.transform",
    }
    assert report.left == {
        "bert.encoder.layer.0.attention.self.query": "Doubled is called as it is",
        "bert.encoder.layer.1": "a hook or a forward was set on it",
        "bert.encoder.layer.2": "its activation is Mish",
    }
    assert "left to transformers: 3" in str(report)
    assert "<td>left to transformers</td><td>bert.encoder.layer.1</td>" in report._repr_html_()


class Doubled(nn.Module):
    """An adapter around a linear layer, like LoRA's."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.weight, self.bias = inner.weight, inner.bias

    def forward(self, x):
        return 2 * self.inner(x)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def adapt(model):
    query = model.bert.encoder.layer[0].attention.self
    query.query = Doubled(query.query)


def watch(model):
    model.bert.encoder.layer[1].intermediate.register_forward_hook(lambda module, _, output: output * 1.5)


def watch_activation(model):
    activation = model.bert.encoder.layer[0].intermediate.intermediate_act_fn
    activation.register_forward_hook(lambda module, _, output: output * 2)


def watch_layer(model):
    model.bert.encoder.layer[0].register_forward_pre_hook(lambda module, arguments: (arguments[0] + 1, *arguments[1:]))


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
    another_norm,
    own_forward,
    another_pooler,
)


@pytest.mark.filterwarnings("ignore")  # of quantisation, which is deprecated
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_around_a_module_keeps_its_effect(change, when):
    model, same = live(), live()
    if when == "after":
        bertfast.patch(model)
        outputs_of(model)  # what was found then must not be believed
    change(model)
    change(same)
    if when == "before":
        bertfast.patch(model)
    want = outputs_of(same, output_hidden_states=True)
    torch.testing.assert_close(outputs_of(model).logits, want.logits, rtol=1e-4, atol=1e-5)
    got = outputs_of(model, output_hidden_states=True).hidden_states
    mask = batch()["attention_mask"].bool()
    for ours, theirs in zip(got, want.hidden_states, strict=True):
        torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-4, atol=1e-5)


def test_a_hook_on_a_layer_sees_what_it_saw():
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


def test_the_hooks_that_record_hidden_states_do_not_keep_later_calls_from_the_fast_way(monkeypatch):
    model = live()
    bertfast.patch(model)
    outputs_of(model, output_hidden_states=True)
    whole = []
    encode = bertfast.models.fused.functions.encode
    monkeypatch.setattr(bertfast.models.fused.functions, "encode", lambda *a: whole.append(1) or encode(*a))
    outputs_of(model)
    assert whole == [1]


def test_a_hook_on_the_encoder_under_a_head_sees_all_of_its_output():
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


def test_dropout_is_drawn_anew_at_each_call_and_from_torchs_generator():
    model = live(hidden_dropout_prob=0.2).train()
    bertfast.patch(model)
    torch.manual_seed(5)
    first, second = outputs_of(model).logits, outputs_of(model).logits
    torch.manual_seed(5)
    assert not torch.equal(first, second)
    assert torch.equal(first, outputs_of(model).logits)


@pytest.mark.parametrize("watched", [False, True])
def test_without_dropout_training_leaves_torchs_generator_to_others(watched):
    """As shuffling and masking, which draw from it, would else differ from those in a run with `transformers`."""
    model = live(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    bertfast.patch(model)
    if watched:
        watch_layer(model)
    before = torch.get_rng_state()
    outputs_of(model).loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_unpatching_leaves_what_was_there():
    model = live("BertForPreTraining")
    plain = copy.deepcopy(model)
    kept = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    bertfast.patch(model)
    names = [*model.state_dict()]
    assert [(name, p.shape) for name, p in model.named_parameters()] == [
        (n, p.shape) for n, p in plain.named_parameters()
    ]
    bertfast.unpatch(model)
    assert kept == {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    values = {name: x for name, x in batch().items() if name != "labels"}
    assert torch.equal(model(**values).prediction_logits, plain(**values).prediction_logits)
    assert names == [*plain.state_dict()]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_patched_and_on_its_own(copied):
    model = live()
    bertfast.patch(model)
    want = outputs_of(model).logits
    other = copied(model)
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight.mul_(3)
    assert torch.equal(outputs_of(model).logits, want)
    assert not torch.allclose(outputs_of(other).logits, want)
    bertfast.unpatch(other)
    assert not bertfast.report(other).fused
    assert bertfast.report(model).fused


def test_saved_files_are_those_of_the_unpatched(tmp_path):
    model = live("BertForMaskedLM")
    model.save_pretrained(tmp_path / "plain")
    bertfast.patch(model)
    model.save_pretrained(tmp_path / "patched")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()


def test_attention_weights_come_from_their_own_code():
    model = live(attn_implementation="eager")
    want = outputs_of(model, output_attentions=True).attentions
    bertfast.patch(model)
    got = outputs_of(model, output_attentions=True).attentions
    assert all(map(torch.equal, got, want))


def test_a_left_to_right_model_generates_the_same_with_its_cache():
    model = live("BertLMHeadModel", is_decoder=True, max_position_embeddings=32)
    ask = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = model.generate(torch.arange(3, 9).view(2, 3), **ask)
    bertfast.patch(model)
    assert torch.equal(model.generate(torch.arange(3, 9).view(2, 3), **ask), want)


@pytest.mark.parametrize("shape", [(3, 11, 11), (3, 1, 11, 11)])
def test_a_mask_between_pairs_of_tokens_is_theirs(shape):
    model = live(attn_implementation="eager")
    mask = torch.rand(shape) > 0.3
    values = {
        "input_ids": batch()["input_ids"],
        "attention_mask": mask if len(shape) == 3 else (mask.float() - 1) * 1e9,
    }
    try:
        want = model(**values).logits
    except Exception as error:  # versions differ in the masks that they take
        pytest.skip(f"transformers {transformers.__version__}: {error}")
    bertfast.patch(model)
    assert torch.equal(model(**values).logits, want)


@pytest.mark.parametrize("change", [None, watch, watch_layer])
def test_packed_input_is_kept_apart(change):
    model = live("BertModel", seed=3)
    if change is not None:
        holder = nn.Module()
        holder.bert = model
        change(holder)
    texts = [torch.randint(53, (1, length)) for length in (4, 1, 7)]
    alone = [model(text) for text in texts]
    bertfast.patch(model)
    packed = model(
        torch.cat(texts, 1),
        position_ids=torch.cat([torch.arange(text.shape[1]) for text in texts])[None],
        cu_seq_lens_q=torch.tensor([0, 4, 5, 12], dtype=torch.int32),
        cu_seq_lens_k=torch.tensor([0, 4, 5, 12], dtype=torch.int32),
        max_length_q=7,
        max_length_k=7,
    )
    want = torch.cat([one.last_hidden_state for one in alone], 1)
    torch.testing.assert_close(packed.last_hidden_state, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        packed.pooler_output, torch.cat([one.pooler_output for one in alone]), rtol=1e-4, atol=1e-5
    )


def test_packed_input_is_refused_where_theirs_would_mix_it():
    model = live("BertModel")
    bertfast.patch(model)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="pass it padded"):
        model(torch.arange(5)[None], cu_seq_lens_q=starts, output_attentions=True)


def test_a_forward_set_on_the_encoder_is_reported():
    model = live()
    model.bert.forward = model.bert.forward
    assert "a forward was set on it" in bertfast.patch(model).left["bert"]


def test_embeddings_instead_of_words_positions_and_types_of_ones_own():
    model = live()
    words = model.get_input_embeddings()(batch()["input_ids"]).detach()
    positions = torch.arange(11).flip(0)[None]
    values = {"inputs_embeds": words, "attention_mask": batch()["attention_mask"], "position_ids": positions}
    want = model(**values).logits
    bertfast.patch(model)
    torch.testing.assert_close(model(**values).logits, want, rtol=1e-4, atol=1e-5)
    arguments = (batch()["input_ids"], batch()["attention_mask"], batch()["token_type_ids"])
    assert isinstance(model.bert(*arguments, return_dict=False), tuple)


def test_more_words_can_be_added():
    model = live("BertForMaskedLM")
    bertfast.patch(model)
    model.resize_token_embeddings(60)
    ids = torch.tensor([[59, 3, 58]])
    logits = model(ids).logits
    assert logits.shape == (1, 3, 60)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    bertfast.unpatch(model)
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of names that version 5 has renamed
@pytest.mark.parametrize("change", [None, watch_layer])
def test_computing_layers_again_for_the_backward_pass_changes_no_gradient(change):
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
    """transformers' own loop records the states, and its layers are recomputed when the call is over."""
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


def test_dropout_is_the_same_when_layers_are_computed_again():
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
def test_recomputed_layers_change_no_bit_under_autocast(reentrant):
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
    """In `transformers`' loop, which records them, as where a layer that is watched runs `transformers`' own code."""
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
    for own, ours in zip(*states, strict=True):
        assert ours.dtype == own.dtype == torch.float32
        assert relative_error(ours[mask], own[mask]) < 0.02


COMPILED = {
    "BertForSequenceClassification": "sequence",
    "BertForMaskedLM": "masked_lm",
    "BertForPreTraining": "pretraining",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_in_one_graph_at_most_twice_for_all_shapes(name, train):
    model = live(name, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train(train)
    bertfast.patch(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    case = next(case for case in CASES if case.name == COMPILED[name])
    for rows, columns, padding in (
        (2, 5, "right"),
        (3, 8, "first"),
        (3, 11, "inside"),
        (2, 3, "left"),
        (3, 10, "first"),
    ):
        values = inputs(case, padding).items()
        values = {key: x[:rows, :columns].contiguous() if x.dim() == 2 else x[:rows] for key, x in values}
        results = []
        for one in (compiled, model):
            model.zero_grad()
            outputs = one(**values)
            outputs.loss.backward()
            found = {key: x.detach() for key, x in outputs.items()}
            results.append(found | {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
        assert results[0].keys() == results[1].keys()
        for key, value in results[0].items():
            torch.testing.assert_close(value, results[1][key], rtol=1e-4, atol=1e-6, msg=f"{key}: {{}}".format)
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_with_graph_breaks_gives_the_same():
    model = live()
    bertfast.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for padding in PADDINGS:
            values = batch(padding)
            torch.testing.assert_close(compiled(**values).logits, model(**values).logits)


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (lambda: "bert", TypeError, "takes a torch module"),
        (lambda: nn.Linear(2, 2), ValueError, "no BertModel of transformers in this Linear"),
        (lambda: Shouting(transformers.BertConfig(**SIZES)), ValueError, "Shouting has a forward of its own"),
        (lambda: promising(hidden_size=96), ValueError, "has hidden_size 96, and the weights have 64"),
        (lambda: promising(max_position_embeddings=99), ValueError, "has max_position_embeddings 99"),
    ],
)
def test_bad_input_is_refused_and_left_as_it_is(model, error, words):
    model = model()
    kinds = [type(module) for module in model.modules()] if isinstance(model, nn.Module) else []
    with pytest.raises(error, match=words):
        bertfast.patch(model)
    assert kinds == ([type(module) for module in model.modules()] if kinds else [])


class Shouting(transformers.BertModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def promising(**changes):
    model = live()
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


def test_only_what_is_patched_can_be_unpatched():
    with pytest.raises(ValueError, match="is not patched"):
        bertfast.unpatch(live())


class Operations(TorchDispatchMode):
    """Notes the name of each operation that runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


def operations_of(model, **changes) -> list[str]:
    """The operations of a forward and a backward pass over a batch with padding."""
    values = batch() | changes
    with Operations() as operations:
        model(**values).loss.backward()
    return operations.names


NO_LIBRARY = "the compiled library was not built"


@pytest.mark.parametrize(
    ("dtype", "library", "slots"),
    [
        (torch.float64, True, 0),
        (torch.float64, False, 0),
        (torch.bfloat16, False, 0),
        (torch.float16, True, 0),
        (torch.float32, False, 34),  # more than a batch has
    ],
)
def test_without_fast_kernels_a_patched_model_runs_the_operations_of_transformers(dtype, library, slots, monkeypatch):
    monkeypatch.setattr(kernel_support, "MIN_SLOTS", slots)
    if not library:
        monkeypatch.setattr(native, "UNAVAILABLE_REASON", NO_LIBRARY)
    plain = live("BertForMaskedLM").to(dtype)
    model = copy.deepcopy(plain)
    bertfast.patch(model)
    labels = torch.where(batch()["attention_mask"] == 1, batch()["input_ids"], -100)
    assert operations_of(model, labels=labels) == operations_of(plain, labels=labels)


@pytest.mark.parametrize(("slots", "columns", "is_packed"), [(33, 11, True), (34, 11, False), (33, 12, False)])
def test_without_the_library_large_batches_in_fp32_are_packed(slots, columns, is_packed, monkeypatch):
    """A batch here has 3 rows and 11 columns."""
    monkeypatch.setattr(native, "UNAVAILABLE_REASON", NO_LIBRARY)
    monkeypatch.setattr(kernel_support, "MIN_SLOTS", slots)
    monkeypatch.setattr(kernel_support, "MIN_COLUMNS", columns)
    plain = live()
    model = copy.deepcopy(plain)
    bertfast.patch(model)
    assert (operations_of(model) != operations_of(plain)) == is_packed


def test_where_a_call_runs_is_decided_at_each_call():
    plain = live()
    model = copy.deepcopy(plain)
    bertfast.patch(model)
    assert operations_of(model) != operations_of(plain)
    assert operations_of(model.double()) == operations_of(plain.double())
    with torch.autocast("cpu", torch.float16):
        assert operations_of(model.float()) == operations_of(plain.float())


def test_packed_input_is_kept_apart_without_fast_kernels():
    model = live("BertModel").double()
    texts = [torch.randint(53, (1, length)) for length in (4, 1, 7)]
    alone = [model(text) for text in texts]
    bertfast.patch(model)
    packed = model(torch.cat(texts, 1), cu_seq_lens_q=torch.tensor([0, 4, 5, 12]), output_hidden_states=True)
    want = torch.cat([one.last_hidden_state for one in alone], 1)
    torch.testing.assert_close(packed.last_hidden_state, want)
    torch.testing.assert_close(packed.hidden_states[-1], want)
    torch.testing.assert_close(packed.pooler_output, torch.cat([one.pooler_output for one in alone]))


def test_the_report_says_that_a_model_is_left_to_transformers():
    report = bertfast.patch(live().double())
    assert set(report.left) == {"bert"}
    assert report.left["bert"].startswith("no fast kernels for float64 on cpu: ")


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "head_dimension", "reason"),
    [
        ("cuda", (7, 5), torch.float16, 64, "no fast kernels for float16 on cuda: .* sm_80 or later"),
        ("cuda", (8, 0), torch.float64, 64, "no fast kernels for float64 on cuda: "),
        ("cuda", (9, 0), torch.bfloat16, 80, "its heads have 80 columns, the kernels take 32, 64, 128"),
        (
            "mps",
            None,
            torch.float32,
            64,
            "no fast kernels for float32 on mps: the kernels run on CPUs and on NVIDIA GPUs",
        ),
        pytest.param(
            *("cpu", None, torch.bfloat16, 48, "its heads have 48 columns, the kernels take 32, 64, 128"),
            marks=pytest.mark.skipif(native.UNAVAILABLE_REASON is not None, reason=str(native.UNAVAILABLE_REASON)),
        ),
        ("cpu", None, torch.float32, 48, None),  # packed without kernels, see `kernel_support`
        ("cuda", (8, 0), torch.bfloat16, 64, None),
        ("cuda", (8, 0), torch.bfloat16, None, None),
    ],
)
def test_devices_without_fast_kernels_are_left_to_transformers(
    device, capability, dtype, head_dimension, reason, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(kernel_support, "HEAD_DIMENSIONS", HEAD_DIMENSIONS)
    found = kernel_support.unsupported_reason(torch.device(device), dtype, head_dimension)
    assert found is None if reason is None else re.search(reason, found), found


def test_rocm_is_left_to_transformers(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in kernel_support.unsupported_reason(torch.device("cuda"), torch.bfloat16, 64)


@pytest.mark.parametrize("name", ["BertForNextSentencePrediction", "BertForTokenClassification", "BertLMHeadModel"])
def test_packed_input_to_a_head_is_kept_apart(name):
    """Before version 5 these heads of `transformers` drop or refuse the arguments that say where sequences start."""
    model = live(name, is_decoder=name == "BertLMHeadModel", use_cache=False)
    texts = [torch.randint(53, (1, length)) for length in (4, 1, 7)]
    alone = [model(text).logits for text in texts]
    bertfast.patch(model)
    packed = model(torch.cat(texts, 1), cu_seq_lens_q=torch.tensor([0, 4, 5, 12]), max_length_q=7).logits
    want = torch.cat(alone, 0 if name == "BertForNextSentencePrediction" else 1)
    torch.testing.assert_close(packed, want, rtol=1e-4, atol=1e-5)


def test_short_inference_without_padding_is_left_to_transformers(monkeypatch):
    model = live("BertModel")
    patched = copy.deepcopy(model)
    bertfast.patch(patched)
    monkeypatch.setattr(kernel_support, "MIN_SLOTS_WITHOUT_PADDING", 128)
    calls, encode = [], fused.functions.encode
    monkeypatch.setattr(fused.functions, "encode", lambda *args: calls.append(args) or encode(*args))
    ids, mask = torch.randint(53, (1, 8)), torch.ones(1, 8)
    with torch.no_grad():
        output = patched(ids, attention_mask=mask).last_hidden_state
        assert torch.equal(output, model(ids, attention_mask=mask).last_hidden_state)
        assert torch.equal(output, patched(ids).last_hidden_state)
        assert not calls
        patched(ids, attention_mask=mask.index_fill(1, torch.tensor([7]), 0))
        patched(ids.expand(16, 8))
        assert len(calls) == 2
    patched(ids)
    assert len(calls) == 3
