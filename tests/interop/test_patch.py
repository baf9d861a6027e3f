"""`bertfast.patch`: a live model of transformers gives the same results, and is what it was after `unpatch`."""

import copy
import pickle
import random

import pytest
import torch
import transformers
from helpers import relative_error
from live_models import Doubled, batch, live, outputs_of
from parity import CASES, PADDINGS, SIZES, assert_parity, attended, double, inputs, models, results
from torch import nn

import bertfast
import bertfast.encoder.encode
import bertfast.models.fused

pytestmark = pytest.mark.usefixtures("small_batches_are_packed")


def without_padding_in_a_softmax(case, padding, values):
    """Remove the answers of a padded batch: the softmax of transformers over their positions includes padding."""
    if case.name == "question" and padding != "none":
        return {name: x for name, x in values.items() if not name.endswith("positions")}
    return values


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, padding):
    _, hf = models(case)
    patched = copy.deepcopy(hf)
    bertfast.patch(patched)
    values, mask = without_padding_in_a_softmax(case, padding, inputs(case, padding)), attended(padding)
    truth = results(double(hf), values, mask)
    assert_parity(results(patched, values, mask), results(hf, values, mask), truth)
    assert_parity(
        results(patched, values, mask, autocast=True),
        results(hf, values, mask, autocast=True),
        truth,
        torch.bfloat16,
    )


@pytest.mark.parametrize("seed", range(100))
def test_outputs_at_attended_positions_are_the_same_for_any_configuration(seed):
    rng = random.Random(seed)
    case, heads, head_dimension = rng.choice(CASES), rng.randint(1, 4), rng.choice([4, 8, 16, 20, 32, 64])
    changes = {
        "num_attention_heads": heads,
        "hidden_size": heads * head_dimension,
        "intermediate_size": rng.randint(1, 80),
        "num_hidden_layers": rng.randint(0, 3),
        "hidden_act": rng.choice(["gelu", "gelu_new", "relu", "silu", "tanh", "mish"]),
        "hidden_dropout_prob": rng.choice([0.0, 0.1]),
        "tie_word_embeddings": rng.random() < 0.5,
        "type_vocab_size": rng.choice([2, 5]),
        "layer_norm_eps": rng.choice([1e-12, 1e-5]),
        "use_cache": False,
    }
    torch.manual_seed(seed)
    config = transformers.BertConfig(**SIZES | case.changes | changes, attn_implementation="eager")
    hf = getattr(transformers, case.class_name)(config, **case.arguments).eval()
    patched = copy.deepcopy(hf)
    bertfast.patch(patched)
    rows, columns = rng.randint(1, 4), rng.randint(1, 16)
    lengths = torch.tensor([[rng.randint(0, columns)] for _ in range(rows)])
    mask = {
        "right": torch.arange(columns) < lengths,
        "left": torch.arange(columns) >= lengths,
        "inside": torch.rand(rows, columns) < 0.6,
        "none": torch.ones(rows, columns, dtype=torch.bool),
    }[rng.choice(["right", "left", "inside", "none"])]
    choices = (2,) if case.class_name == "BertForMultipleChoice" else ()
    values = {
        "input_ids": torch.randint(SIZES["vocab_size"], (rows, *choices, columns)),
        "token_type_ids": torch.randint(config.type_vocab_size, (rows, *choices, columns)),
        "attention_mask": (mask[:, None].repeat(1, 2, 1) if choices else mask).long(),
    }
    with torch.no_grad():
        fused, plain, truth = (dict(model(**values).items()) for model in (patched, hf, double(hf)))
    assert fused.keys() == plain.keys()
    of_rows = (
        "pooler_output",
        "seq_relationship_logits",
        *(["logits"] if truth.get("logits", mask).dim() == 2 else []),
    )
    for name, true in truth.items():
        # In a row that attends to nothing, the softmax of transformers runs over padding.
        read = mask.any(1) if name in of_rows else mask
        if read.any():
            error, allowed = (relative_error(x[name][read].double(), true[read]) for x in (fused, plain))
            assert error <= 4 * allowed + 1e-6, f"{name}: {error:.3g}, transformers {allowed:.3g}"


def test_the_report_says_what_is_fused_and_why_the_rest_is_not():
    model = live("BertForMaskedLM", num_hidden_layers=3)
    layers = model.bert.encoder.layer
    layers[0].attention.self.query = Doubled(layers[0].attention.self.query)
    layers[1].register_forward_hook(lambda *_: None)
    layers[1].output.dense.register_forward_hook(lambda *_: None)
    layers[2].intermediate.intermediate_act_fn = nn.Mish()
    report = bertfast.patch(model)
    assert set(report.fused) == {
        "bert.embeddings",
        "bert.encoder.layer.0",
        "cls.predictions.transform",
    }
    assert report.left == {
        "BertForMaskedLM": "encoder.layer.1: it has a hook or a replaced forward",
        "bert.encoder.layer.0.attention.self.query": (
            f"{Doubled.__module__}.Doubled is called as a module: its weights cannot be read"
        ),
        "bert.encoder.layer.1": "it has a hook or a replaced forward",
        "bert.encoder.layer.2": "its activation is Mish",
    }
    assert "left to transformers: 4" in str(report)
    assert "<td>left to transformers</td><td>bert.encoder.layer.1</td>" in report._repr_html_()


def test_unpatching_restores_the_model():
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
def test_a_copy_is_patched_and_independent(copied):
    model = live()
    bertfast.patch(model)
    expected = outputs_of(model).logits
    other = copied(model)
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight.mul_(3)
    assert torch.equal(outputs_of(model).logits, expected)
    assert not torch.allclose(outputs_of(other).logits, expected)
    bertfast.unpatch(other)
    assert not bertfast.report(other).fused
    assert bertfast.report(model).fused


def test_patching_does_not_change_saved_files(tmp_path):
    model = live("BertForMaskedLM")
    model.save_pretrained(tmp_path / "plain")
    bertfast.patch(model)
    model.save_pretrained(tmp_path / "patched")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()


def test_a_forward_set_on_the_encoder_is_reported():
    model = live()
    model.bert.forward = model.bert.forward
    assert "its `forward` was replaced on the instance" in bertfast.patch(model).left["bert"]


def test_token_embeddings_can_be_resized():
    model = live("BertForMaskedLM")
    bertfast.patch(model)
    model.resize_token_embeddings(60)
    ids = torch.tensor([[59, 3, 58]])
    logits = model(ids).logits
    assert logits.shape == (1, 3, 60)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    bertfast.unpatch(model)
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (lambda: "bert", TypeError, "takes a torch module"),
        (lambda: nn.Linear(2, 2), ValueError, "nothing to fuse in this Linear: it holds no supported encoder"),
        (lambda: OwnForward(transformers.BertConfig(**SIZES)), ValueError, "OwnForward has a forward of its own"),
        (lambda: model_with_config(hidden_size=96), ValueError, "has hidden_size 96, and the weights have 64"),
        (lambda: model_with_config(max_position_embeddings=99), ValueError, "has max_position_embeddings 99"),
    ],
)
def test_an_unsupported_model_is_refused_and_not_changed(model, error, words):
    model = model()
    kinds = [type(module) for module in model.modules()] if isinstance(model, nn.Module) else []
    with pytest.raises(error, match=words):
        bertfast.patch(model)
    assert kinds == ([type(module) for module in model.modules()] if kinds else [])


class OwnForward(transformers.BertModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def model_with_config(**changes):
    model = live()
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


def test_a_model_that_is_not_patched_cannot_be_unpatched():
    with pytest.raises(ValueError, match="is not patched"):
        bertfast.unpatch(live())
