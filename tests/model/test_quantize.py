"""`bertfast.quantize`: int8 models stay close to what they were, are saved and opened, and refuse to be changed."""

import copy
import json
import logging

import family_models
import pytest
import torch
import transformers
from live_models import Doubled, batch, live, outputs_of
from safetensors.torch import load_file
from torch import nn

import bertfast
from bertfast.encoder.packed_layer import PackedLayer
from bertfast.encoder.packed_linear import PackedLinear
from bertfast.models import open_quantised
from bertfast.models.bert import BertModel
from bertfast.models.files import load
from bertfast.models.freeze import linear_groups
from bertfast.ops.packed_linear import quantise
from bertfast.runtime.torch_compat import module_hooks
from bertfast.tasks.tables import read_table

FROZEN = "this model is frozen for inference: load it again to train or change it"
TASKS = ("Model", "ForSequenceClassification", "ForMaskedLM")
CASES = [case for case in family_models.CASES if case.task in TASKS]


def quantised(model: nn.Module, calibration=None) -> nn.Module:
    result = copy.deepcopy(model)
    bertfast.quantize(result, calibration)
    return result


def hidden(model: nn.Module, values) -> torch.Tensor:
    return model(**values).last_hidden_state


def cosines(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.cosine_similarity(x.float(), y.float(), dim=-1)


def without_labels(values) -> dict[str, torch.Tensor]:
    return {name: x for name, x in values.items() if name != "labels"}


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_every_family_stays_close(case):
    hf = family_models.plain(case)
    values, mask = family_models.inputs(case, hf)
    values = without_labels(values)
    model = quantised(hf, [values])
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    paths = [path for _, group in linear_groups(model) for path in group]
    assert len(linears) == len(paths) > 0
    assert all(linear.is_int8 and len(linear.packed.factors) for linear in linears)
    expected, actual = hf(**values)[0], model(**values)[0]
    if expected.shape[:2] == mask.shape:
        expected, actual = expected[mask], actual[mask]
    assert not torch.equal(expected, actual)
    assert cosines(actual, expected).mean() >= 0.999
    report = bertfast.report(model)
    assert sum(sentence == "runs on packed tokens and int8 weights" for sentence in report.fused.values()) == 2


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_every_family_is_saved_and_opened_bitwise(case, tmp_path):
    model = family_models.plain(case)
    values, _ = family_models.inputs(case, model)
    values = without_labels(values)
    bertfast.quantize(model, [values])
    model.save_pretrained(tmp_path)
    opened = getattr(bertfast, f"AutoModel{case.task.removeprefix('Model')}").from_pretrained(tmp_path)
    state = model.state_dict()
    assert opened.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in opened.state_dict().items())
    assert torch.equal(opened(**values)[0], model(**values)[0])
    assert str(bertfast.report(opened)) == str(bertfast.report(model))


@torch.no_grad()
def test_a_bf16_model_keeps_its_dtype_on_disk(tmp_path):
    model = quantised(live().bfloat16(), [batch()])
    model.save_pretrained(tmp_path)
    opened = bertfast.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert opened.dtype == torch.bfloat16
    assert torch.equal(outputs_of(opened).logits, outputs_of(model).logits)


@torch.no_grad()
def test_the_encoder_of_a_saved_head_is_opened_alone_and_by_programs(tmp_path):
    model = quantised(live(), [batch()])
    model.save_pretrained(tmp_path)
    values = without_labels(batch())
    expected = model.bert(**values).last_hidden_state
    encoder, info = bertfast.AutoModel.from_pretrained(str(tmp_path), output_loading_info=True)
    assert torch.equal(hidden(encoder, values), expected)
    assert not info["missing_keys"]
    opened, missing, _ = load(BertModel, tmp_path, takes_quantised=True)
    assert torch.equal(hidden(opened, values), expected)
    assert not missing
    with pytest.raises(ValueError, match="is quantised to int8, which `bertfast predict`, `embed`,"):
        load(BertModel, tmp_path)


@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification", "BertForMaskedLM"])
@torch.no_grad()
def test_fused_classes_open_a_quantised_folder(name, tmp_path):
    model = quantised(live(name), [without_labels(batch())])
    model.save_pretrained(tmp_path)
    kind = getattr(bertfast, name)
    opened, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert type(opened) is kind
    assert not info["missing_keys"]
    assert torch.equal(opened(**without_labels(batch()))[0], model(**without_labels(batch()))[0])
    assert str(bertfast.report(opened)) == str(bertfast.report(model))
    config = transformers.BertConfig.from_pretrained(tmp_path)
    given = kind.from_pretrained(str(tmp_path), config=config)
    assert torch.equal(given(**without_labels(batch()))[0], model(**without_labels(batch()))[0])
    opened.save_pretrained(tmp_path / "again")
    first, second = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@torch.no_grad()
def test_the_fused_encoder_of_a_saved_head_and_a_new_head_on_an_encoder(tmp_path):
    model = quantised(live(), [batch()])
    model.save_pretrained(tmp_path / "head")
    encoder = bertfast.BertModel.from_pretrained(tmp_path / "head")
    assert torch.equal(hidden(encoder, without_labels(batch())), model.bert(**without_labels(batch()))[0])
    encoder.save_pretrained(tmp_path / "encoder")
    opened = bertfast.BertForTokenClassification.from_pretrained(tmp_path / "encoder", num_labels=7)
    assert opened.classifier.out_features == 7
    assert torch.equal(hidden(opened.bert, without_labels(batch())), hidden(encoder, without_labels(batch())))


@pytest.mark.parametrize(
    ("heading", "named"),
    [
        (None, "classifier"),  # that of the installed version
        ("Some weights were not initialized from the model checkpoint at None and are", "checkpoint at {} and are"),
    ],
)
def test_a_report_of_missing_weights_names_the_folder(heading, named, tmp_path, caplog):
    quantised(live("BertModel"), [without_labels(batch())]).save_pretrained(tmp_path)
    reports = logging.getLogger("transformers.modeling_utils")
    reports.addHandler(caplog.handler)
    try:
        if heading is None:
            bertfast.BertForTokenClassification.from_pretrained(tmp_path)
        else:
            with open_quantised._named_in_reports(tmp_path):
                reports.warning(heading)
    finally:
        reports.removeHandler(caplog.handler)
    assert named.format(tmp_path) in caplog.text
    assert str(tmp_path) in caplog.text
    assert "None" not in caplog.text
    assert not reports.filters


@pytest.mark.parametrize("auto", [False, True], ids=["class", "auto"])
@pytest.mark.parametrize("inner", ["", "int8"])
@torch.no_grad()
def test_a_quantised_model_on_the_hub_is_opened(auto, inner, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = quantised(live(), [batch()])
    repository, commit = tmp_path / "models--someone--bert", "0123456789" * 4
    model.save_pretrained(repository / "snapshots" / commit / inner)
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text(commit)
    kind = bertfast.AutoModelForSequenceClassification if auto else bertfast.BertForSequenceClassification
    where = {"cache_dir": str(tmp_path), "local_files_only": True, "token": False, "subfolder": inner}
    opened = kind.from_pretrained("someone/bert", revision="v2", **where)
    assert any(isinstance(module, PackedLinear) and module.is_int8 for module in opened.modules())
    assert torch.equal(outputs_of(opened).logits, outputs_of(model).logits)
    with pytest.raises(OSError, match="find them in the cached files"):
        kind.from_pretrained("someone/bert", revision="v3", **where)


def test_transformers_never_takes_int8_for_weights(tmp_path):
    quantised(live()).save_pretrained(tmp_path)
    for kind in (transformers.AutoModel, transformers.BertForSequenceClassification):
        with pytest.raises(ValueError, match="no `quant_method`"):
            kind.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("quantization_config") == {"library": "bertfast", "weights": "int8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, info = transformers.BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert {"bert.encoder.layer.0.output.dense.weight"} <= {*info["missing_keys"]}  # of which it warns


def with_outliers(hf: nn.Module) -> nn.Module:
    """Return the same function with channels between layers that are 100 times as large."""
    model = copy.deepcopy(hf)
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.self.value.weight[3:5] *= 100
            layer.attention.self.value.bias[3:5] *= 100
            layer.attention.output.dense.weight[:, 3:5] /= 100
    return model


@torch.no_grad()
def test_calibration_keeps_the_accuracy_of_a_model_with_outlier_channels(monkeypatch):
    hf = live("BertModel", initializer_range=0.1)
    model, values = with_outliers(hf), without_labels(batch())
    mask = values["attention_mask"].bool()
    expected = hidden(hf, values)[mask]
    torch.testing.assert_close(hidden(model, values)[mask], expected, rtol=1e-3, atol=1e-4)
    calibrated = cosines(hidden(quantised(model, [values]), values)[mask], expected)
    monkeypatch.setattr("bertfast.models.quantize._factors", lambda weight, maxima: None)
    plain = cosines(hidden(quantised(model), values)[mask], expected)
    assert calibrated.mean() >= 0.999
    assert 1 - calibrated.mean() < 0.5 * (1 - plain.mean())


@torch.no_grad()
def test_factors_are_those_of_smoothquant():
    model = live("BertModel")
    dense = model.encoder.layer[0].output.dense
    weight, seen = dense.weight.clone(), []
    hook = dense.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    bertfast.patch(model)
    values = without_labels(batch("none"))
    model(**values)
    hook.remove()
    bertfast.quantize(model, [values, values])
    factors = model.encoder.layer[0].output.dense.packed.factors
    expected = (weight.abs().amax(0) / torch.cat(seen).abs().amax(0)).sqrt()
    torch.testing.assert_close(factors, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_channel_that_calibration_does_not_reach_is_finite():
    model = live("BertModel")
    attention = model.encoder.layer[0].attention
    for parameter in (attention.self.value.weight, attention.self.value.bias):
        parameter[7] = 0
    attention.output.dense.weight[:, 9] = 0
    model = quantised(model, [without_labels(batch())])
    factors = model.encoder.layer[0].attention.output.dense.packed.factors
    assert (factors.isfinite() & (factors > 0)).all()
    assert factors[7] < 20 * factors.median()
    assert outputs_of_model(model).isfinite().all()


def outputs_of_model(model: nn.Module) -> torch.Tensor:
    return hidden(model, without_labels(batch()))


def test_queries_keys_and_values_share_factors_and_hooks_are_gone(monkeypatch):
    calls, run = [], PackedLayer.__call__
    monkeypatch.setattr(PackedLayer, "__call__", lambda self, *args: calls.append(1) or run(self, *args))
    model = quantised(live(), [batch()])
    attention = model.bert.encoder.layer[0].attention.self
    assert attention.query.group is attention.value.group
    assert attention.query.packed.factors is attention.value.packed.factors
    assert not any(any(module_hooks(module)) for module in model.modules())
    assert not calls
    outputs_of(model)
    assert len(calls) == 2


def test_values_and_scales_are_those_of_the_scaled_weights():
    hf = live("BertModel")
    packed = quantised(hf, [without_labels(batch())]).encoder.layer[1].intermediate.dense.packed
    expected = quantise(hf.encoder.layer[1].intermediate.dense.weight, None, packed.factors)
    assert torch.equal(packed.unpacked(), expected.unpacked())
    assert torch.equal(packed.scales, expected.scales)


@torch.no_grad()
def test_without_texts_random_tokens_calibrate():
    first, second = (quantised(live("BertForSequenceClassification")) for _ in range(2))
    linears = [module for module in first.modules() if isinstance(module, PackedLinear)]
    assert all(len(linear.packed.factors) for linear in linears)
    assert torch.equal(outputs_of(first).logits, outputs_of(second).logits)


@torch.no_grad()
def test_a_layer_that_cannot_be_quantised_stays_and_the_report_says_so():
    model = live("BertModel")
    model.encoder.layer[1].intermediate.dense.weight[5, 5] = float("inf")
    model.encoder.layer[0].output.dense = Doubled(model.encoder.layer[0].output.dense)
    report = bertfast.quantize(model)
    left = report.left["BertModel.encoder.layer.1.intermediate.dense"]
    assert left.startswith("its weight has values that are not finite")
    assert "is called as a module" in report.left["BertModel.encoder.layer.0.output.dense"]
    assert len(report.left) == 2
    dense = model.encoder.layer[1].intermediate.dense
    assert isinstance(dense, PackedLinear)
    assert not dense.is_int8


def test_what_would_change_it_is_refused_and_changes_nothing():
    model = quantised(live(), [batch()])
    before = outputs_of(model).logits
    for change in (
        lambda: model.train(),
        lambda: model.load_state_dict(live(seed=1).state_dict()),
        lambda: model.half(),
    ):
        with pytest.raises((RuntimeError, ValueError), match=FROZEN):
            change()
    assert torch.equal(outputs_of(model).logits, before)
    assert torch.equal(outputs_of(copy.deepcopy(model)).logits, before)


def test_what_cannot_be_quantised():
    with pytest.raises(TypeError, match="quantize takes a torch module that holds an encoder, not a str"):
        bertfast.quantize("bert-base-uncased")
    with pytest.raises(ValueError, match="there is nothing to fuse in this Linear"):
        bertfast.quantize(nn.Linear(2, 2))
    model = live()
    for calibration in (batch(), "text", [torch.ones(1, 2)], 3):
        with pytest.raises(TypeError, match="calibration must be a list of batches, each a dictionary"):
            bertfast.quantize(model, calibration)
    with pytest.raises(ValueError, match="calibration has no batch: give a few"):
        bertfast.quantize(model, [])


def test_a_quantised_model_stays_quantised():
    model = quantised(live(), [batch()])
    before = outputs_of(model).logits
    for report in (bertfast.quantize(model), bertfast.quantize(model, [batch()]), bertfast.freeze(model)):
        assert str(report) == str(bertfast.report(model))
    with pytest.raises(
        ValueError, match="is quantised to int8: load the model from which it was made to freeze it in bf"
    ):
        bertfast.freeze(model, "bf16")
    assert torch.equal(outputs_of(model).logits, before)


@torch.no_grad()
def test_sentence_vectors_of_a_published_model(request, shared_data, monkeypatch):
    folders = [*request.config.rootpath.glob("build/minilm/*/model")]
    if not folders:
        pytest.skip("there is no published model in build/minilm (make build/minilm)")
    folder = next(path.parent for path in folders[0].rglob("config.json") if (path.parent / "tokenizer.json").exists())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = read_table(shared_data / "glue" / "SST-2" / "dev.tsv.gz").texts("sentence")[:332]
    batches = [
        dict(tokenizer(texts[first : first + 32], padding=True, return_tensors="pt"))
        for first in range(0, len(texts), 32)
    ]

    def vectors(model: nn.Module) -> torch.Tensor:
        means = []
        for values in batches[1:]:
            mask = values["attention_mask"][..., None]
            means.append((hidden(model, values) * mask).sum(1) / mask.sum(1))
        return torch.cat(means)

    model = bertfast.AutoModel.from_pretrained(folder)
    expected = vectors(model)
    found = [cosines(vectors(quantised(model, calibration)), expected) for calibration in (batches[:1], None)]
    monkeypatch.setattr("bertfast.models.quantize._factors", lambda weight, maxima: None)
    plain = cosines(vectors(quantised(model)), expected)
    for cosine in found:
        assert cosine.mean() >= 0.999
        assert cosine.quantile(0.01) >= 0.99
        assert 1 - cosine.mean() < 0.75 * (1 - plain.mean())
