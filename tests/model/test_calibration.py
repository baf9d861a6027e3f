"""What is wrong in the calibration of `bertfast.quantize` is named, and leaves the model as it was."""

import importlib
import logging
import sys
from pathlib import Path

import pytest
import torch
import transformers
from live_models import batch, live, outputs_of
from parity import SIZES

import bertfast
from bertfast.encoder.packed_linear import is_frozen
from bertfast.runtime.torch_compat import module_hooks

sys.path.append(str(Path(__file__).parents[2] / "examples"))
tiny_model = importlib.import_module("tiny_model")

WRONG_CALIBRATION = {
    "list": ({"input_ids": [[1, 2]]}, TypeError, r"calibration\[1\]\['input_ids'\] is a list: pass a tensor"),
    "tokenizer": (
        transformers.BatchEncoding({"input_ids": [[1, 2]]}),
        TypeError,
        r"calibration\[1\]\['input_ids'\] is a list",
    ),
    "id": (
        {"input_ids": torch.tensor([[1, 10**6]])},
        ValueError,
        r"calibration\[1\]\['input_ids'\] has the id 1000000",
    ),
    "negative": (
        {"input_ids": torch.tensor([[1, -100]])},
        ValueError,
        r"\['input_ids'\] has the id -100, and those of",
    ),
    "name": ({"inputs": torch.ones(1, 2)}, (TypeError, ValueError), "inputs|input_ids"),
    "shape": ({"input_ids": torch.ones(1, 2, 3, 4).long()}, (IndexError, RuntimeError, ValueError), None),
    "NaN": (
        {"inputs_embeds": torch.full((1, 4, SIZES["hidden_size"]), float("nan"))},
        ValueError,
        r"calibration\[1\] gives the encoder activations that are NaN or infinite",
    ),
    "infinite": (
        {"inputs_embeds": torch.full((2, 4, SIZES["hidden_size"]), float("inf"))},
        ValueError,
        r"calibration\[1\] gives the encoder activations that are NaN or infinite",
    ),
}


@pytest.mark.parametrize("is_fused", [False, True], ids=["live", "fused"])
@pytest.mark.parametrize("wrong", WRONG_CALIBRATION)
def test_an_error_in_calibration_changes_nothing(wrong, is_fused):
    model = live()
    if is_fused:
        bertfast.patch(model)
    model.train()
    model.bert.embeddings.eval()
    outputs_of(model)
    kinds, modes = ([f(module) for module in model.modules()] for f in (type, lambda module: module.training))
    values, error, match = WRONG_CALIBRATION[wrong]
    with pytest.raises(error, match=match):
        bertfast.quantize(model, [batch(), values])
    assert [type(module) for module in model.modules()] == kinds
    assert [module.training for module in model.modules()] == modes
    assert not any(any(module_hooks(module)) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    bertfast.quantize(model, [transformers.BatchEncoding(batch()), batch() | {"return_dict": True}])
    assert not model.training


class TakesDictionary(torch.nn.Sequential):
    """What SentenceTransformer is: modules that take a dictionary of features, and add their results to it."""

    def __init__(self, model):
        super().__init__(model)
        self.seen = []

    def forward(self, input, **options):
        self.seen.append({**input})
        input |= self[0](**{name: x for name, x in input.items() if isinstance(x, torch.Tensor)})
        return input


def test_a_module_that_takes_a_dictionary_is_calibrated_on_it():
    values = {name: x for name, x in batch().items() if name != "labels"}
    expected = live("BertModel")
    bertfast.quantize(expected, [values])
    for features in (values | {"modality": "text"}, {"input": values | {"modality": "text"}}):
        before = {**features}
        model = TakesDictionary(live("BertModel"))
        bertfast.quantize(model, [features])
        assert len(model.seen) == 1
        assert features.keys() == before.keys()
        state = model[0].state_dict()
        assert all(torch.equal(x, state[name]) for name, x in expected.state_dict().items())
    wrong = values | {"input_ids": torch.tensor([[10**6]])}
    for features in (wrong, {"input": wrong}):
        with pytest.raises(ValueError, match=r"\['input_ids'\] has the id 1000000"):
            bertfast.quantize(TakesDictionary(live("BertModel")), [features])


def test_sentence_transformers_are_calibrated_on_what_they_tokenize(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tiny_model.save_tiny_model(tmp_path, bertfast.BertModel)
    texts = ["A short text.", "The second reading of a sample agreed with the first."] * 8
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    expected = model.encode(texts)
    features = getattr(model, "preprocess", model.tokenize)(texts)
    bertfast.quantize(model, [features])
    actual = model.encode(texts)
    assert (actual != expected).any()
    assert torch.cosine_similarity(*map(torch.from_numpy, (actual, expected))).min() > 0.99
    model.save(str(tmp_path / "int8"))
    assert is_frozen(bertfast.AutoModel.from_pretrained(tmp_path / "int8"))


@pytest.mark.parametrize("as_dictionary", [False, True], ids=["arguments", "dictionary"])
@pytest.mark.parametrize(("count", "warns"), [(1, True), (31, True), (32, False)])
def test_a_calibration_of_few_different_tokens_warns_once(count, warns, as_dictionary, caplog):
    model = live("BertModel")
    ids = torch.arange(5, 5 + count)
    batches = [{"input_ids": part[None]} for part in (*ids.split(16), ids[-3:])]
    with caplog.at_level(logging.WARNING, "bertfast"):
        bertfast.quantize(TakesDictionary(model) if as_dictionary else model, batches)
    sentence = f"calibration has {count} different token{'s' * (count > 1)}, too few to show the range of activations:"
    assert caplog.text.count(sentence) == warns
    assert len(caplog.records) == warns


@torch.no_grad()
def test_weights_that_are_not_finite_do_not_blame_calibration():
    model = live("BertModel")
    model.encoder.layer[0].intermediate.dense.weight[5, 5] = float("inf")
    report = bertfast.quantize(model, [{"input_ids": batch()["input_ids"]}])
    assert {*report.left} == {"BertModel.encoder.layer.0.intermediate.dense"}
