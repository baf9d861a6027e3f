"""Folders of quantised models with damaged or foreign files are refused, naming the folder and the weight."""

import json
import re
import shutil

import pytest
import torch
import transformers
from live_models import batch, live, outputs_of
from safetensors.torch import load_file, save_file

import bertfast
from bertfast.encoder.packed_linear import has_int8
from bertfast.models.bert import BertForSequenceClassification
from bertfast.models.files import load

DENSE = "bert.encoder.layer.1.output.dense"
KEY = "bert.encoder.layer.0.attention.self.key"
AGAIN = ": copy the files again, or save the quantised model again"
BELONGS = ": take the config.json that belongs to the weights"
ROWS, COLUMNS = live().get_submodule(DENSE).weight.shape


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    model = live()
    bertfast.quantize(model, [batch()])
    model.save_pretrained(folder)
    return folder


def of_int8(entry, change):
    """Return what replaces an entry of a quantised layer by what `change` makes of it."""
    return lambda weights: weights.update({f"{DENSE}.{entry}": change(weights[f"{DENSE}.{entry}"])})


def fill(value):
    return lambda x: torch.full_like(x, value)


DAMAGED_WEIGHTS = {
    "NaN scales": (of_int8("weight_scale", fill(torch.nan)), f"{DENSE}.weight_scale has values that are negative, NaN"),
    "negative scales": (of_int8("weight_scale", fill(-1)), f"{DENSE}.weight_scale has values that are negative, NaN"),
    "other scales": (
        of_int8("weight_scale", lambda x: torch.ones(5)),
        f"{DENSE}.weight_scale is float32 [5], and must be float32 [{ROWS}]{AGAIN}",
    ),
    "bf16 scales": (
        of_int8("weight_scale", torch.Tensor.bfloat16),
        f"{DENSE}.weight_scale is bfloat16 [{ROWS}], and must be float32 [{ROWS}]{AGAIN}",
    ),
    "no scales": (lambda weights: weights.pop(f"{DENSE}.weight_scale"), f"has no {DENSE}.weight_scale{AGAIN}"),
    "zero factors": (of_int8("input_factors", fill(0)), f"{DENSE}.input_factors has values that are zero, negative,"),
    "infinite factors": (of_int8("input_factors", fill(torch.inf)), "has values that are zero, negative, NaN or inf"),
    "other factors": (
        of_int8("input_factors", lambda x: x[1:].clone()),
        f"{DENSE}.input_factors is float32 [{COLUMNS - 1}], and must be float32 [{COLUMNS}]{AGAIN}",
    ),
    "no factors": (lambda weights: weights.pop(f"{DENSE}.input_factors"), f"has no {DENSE}.input_factors{AGAIN}"),
    "factors of one input": (
        lambda weights: weights.update({f"{KEY}.input_factors": 3 * weights[f"{KEY}.input_factors"]}),
        "input_factors of bert.encoder.layer.0.attention.self.key and bert.encoder.layer.0.attention.self.query, which",
    ),
    "fp32 values": (
        of_int8("weight_int8", torch.Tensor.float),
        f"{DENSE}.weight_int8 is float32 [{ROWS}, {COLUMNS}], and must be int8 [outputs, inputs]{AGAIN}",
    ),
    "flat values": (of_int8("weight_int8", lambda x: x.flatten()), "weight_int8 is int8 [" + f"{ROWS * COLUMNS}], and"),
    "value of -128": (of_int8("weight_int8", fill(-128)), f"{DENSE}.weight_int8 has the value -128, and the least is"),
    "no values": (lambda weights: weights.pop(f"{DENSE}.weight_int8"), f"has no {DENSE}.weight_int8{AGAIN}"),
    "both": (
        lambda weights: weights.update({f"{DENSE}.weight": torch.zeros(ROWS, COLUMNS)}),
        f"{DENSE}.weight is there as well as weight_int8{AGAIN}",
    ),
    "no layer": (
        lambda weights: [weights.pop(key) for key in [*weights] if key.startswith(f"{DENSE}.")],
        f"lacks weights that its config.json describes, {DENSE}.weight and 1 more{BELONGS}",
    ),
    "no bias": (
        lambda weights: weights.pop(f"{DENSE}.bias"),
        f"lacks weights that its config.json describes, {DENSE}.bias{BELONGS}",
    ),
    "extra norm": (
        lambda weights: weights.update({"bert.encoder.layer.9.output.LayerNorm.bias": torch.ones(ROWS)}),
        "has weights that its config.json does not describe, bert.encoder.layer.9.output.LayerNorm.bias: take the",
    ),
    "int8 head": (
        lambda weights: weights.update(
            {
                "classifier.weight_int8": torch.ones(weights["classifier.weight"].shape, dtype=torch.int8),
                "classifier.weight_scale": torch.ones(len(weights["classifier.weight"])),
                "classifier.input_factors": torch.ones(weights.pop("classifier.weight").shape[1]),
            }
        ),
        f"classifier.weight_int8 is not that of a linear layer in an encoder layer{AGAIN}",
    ),
    "NaN bias": (
        lambda weights: weights[f"{DENSE}.bias"].fill_(torch.nan),
        f"{DENSE}.bias has values that are NaN or infinite: use another checkpoint",
    ),
}
DAMAGED_CONFIGS = {
    "fewer layers": ({"num_hidden_layers": 1}, "its config.json does not describe, bert.encoder.layer.1."),
    "more layers": ({"num_hidden_layers": 3}, "lacks weights that its config.json describes, bert.encoder.layer.2."),
    "other layers": ({"intermediate_size": 8}, " has shape [48"),
    "other vocabulary": ({"vocab_size": 9}, "embeddings.word_embeddings.weight has shape ["),
    "odd heads": ({"num_attention_heads": 3}, "hidden_size must be a multiple of num_attention_heads, got"),
    "int4": (
        {"quantization_config": {"library": "bertfast", "weights": "int4"}},
        "quantization_config has weights 'int4', and this version of bertfast opens 'int8': install a later version",
    ),
    "no object": (
        {"quantization_config": "int8"},
        f"config.json: quantization_config must be an object, got 'int8'{BELONGS}",
    ),
    "unknown entry": (
        {"quantization_config": {"library": "bertfast", "weights": "int8", "group_size": 32}},
        "quantization_config has an entry 'group_size', which this version of bertfast does not know: install a later",
    ),
}
DAMAGED_FILES = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "model.safetensors is damaged or cut off ("),
    "text": (lambda path: path.write_text("no weights" * 9), "model.safetensors is damaged or cut off ("),
    "empty": (lambda path: path.write_bytes(b""), "model.safetensors is empty: copy or download it again"),
}
WAYS = {
    "auto": bertfast.AutoModelForSequenceClassification.from_pretrained,
    "class": bertfast.BertForSequenceClassification.from_pretrained,
    "program": lambda folder: load(BertForSequenceClassification, folder, takes_quantised=True),
}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def open_model(request):
    return request.param


@pytest.fixture
def folder(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "damaged")


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_config(folder, **entries):
    values = json.loads((folder / "config.json").read_text()) | entries
    values = {key: value for key, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))


def refuses(folder, message):
    return pytest.raises(ValueError, match=f"{re.escape(str(folder))}.*{re.escape(message)}")


@pytest.mark.parametrize(("change", "message"), DAMAGED_WEIGHTS.values(), ids=DAMAGED_WEIGHTS)
def test_damaged_weights_are_refused(change, message, open_model, folder):
    change_weights(folder, change)
    with refuses(folder, message):
        open_model(folder)


@pytest.mark.parametrize(("change", "message"), DAMAGED_CONFIGS.values(), ids=DAMAGED_CONFIGS)
def test_configurations_of_other_weights_are_refused(change, message, open_model, folder):
    change_config(folder, **change)
    with refuses(folder, message):
        open_model(folder)


@pytest.mark.parametrize(("change", "message"), DAMAGED_FILES.values(), ids=DAMAGED_FILES)
def test_damaged_files_are_refused(change, message, open_model, folder):
    change(folder / "model.safetensors")
    with refuses(folder, message):
        open_model(folder)


def test_a_folder_in_place_of_the_weights_is_none(open_model, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(folder))} holds no weights: "):
        open_model(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [("state_dict", {}), ("key_mapping", {"a": "b"}), ("quantization_config", {}), ("use_safetensors", False)],
)
@pytest.mark.parametrize("kind", [bertfast.AutoModel, bertfast.BertForSequenceClassification])
def test_arguments_of_other_weights_are_refused(kind, name, value, folder):
    with refuses(folder, f"which are opened as they are: leave {name} out, or open the model from which"):
        kind.from_pretrained(folder, **{name: value})


def test_a_configuration_without_layers_is_refused(open_model, folder):
    change_config(folder, num_hidden_layers=0)
    with refuses(folder, ""):
        open_model(folder)
    with refuses(folder, "its config.json does not describe, bert.encoder.layer.0."):
        bertfast.AutoModelForSequenceClassification.from_pretrained(folder)


def test_int8_in_the_configuration_alone_is_refused(open_model, folder):
    live().save_pretrained(folder.with_name("fp32"))
    shutil.copy(folder.with_name("fp32") / "model.safetensors", folder)
    with refuses(folder, f"config.json says that the model is quantised to int8, but no weight is{BELONGS}"):
        open_model(folder)


@torch.no_grad()
def test_int8_in_the_weights_alone_is_opened(open_model, intact, folder):
    expected = outputs_of(bertfast.BertForSequenceClassification.from_pretrained(intact)).logits
    change_config(folder, quantization_config=None)
    opened = open_model(folder)
    opened = opened[0] if isinstance(opened, tuple) else opened
    assert has_int8(opened)
    assert torch.equal(outputs_of(opened).logits, expected)


@pytest.mark.parametrize("model_type", ["roberta", "gpt2"])
@pytest.mark.parametrize("kind", [bertfast.AutoModel, bertfast.AutoModelForSequenceClassification])
def test_other_families_are_refused(kind, model_type, folder):
    change_config(folder, model_type=model_type)
    problem = "the model_type 'roberta', and the architecture" if model_type == "roberta" else "cannot be quantised"
    with refuses(folder, problem):
        kind.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": 3}, "hidden_act"),
        ({"model_type": 3}, "config.json: this is no configuration of a model: "),
        ({"torch_dtype": "x", "dtype": "x"}, "config.json: this is no configuration of a model: "),
        ({"quantization_config": {"quant_method": "gptq"}}, "its quantization_config is not that of bertfast, as the"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [bertfast.AutoModel, bertfast.AutoModelForSequenceClassification])
def test_entries_that_transformers_refuses_are_named_with_their_file(kind, changes, message, folder):
    change_config(folder, **changes)
    with refuses(folder, message):
        kind.from_pretrained(folder)


def test_a_variant_that_is_not_there_is_refused(folder):
    model = bertfast.BertForSequenceClassification.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"damaged has no model.x.safetensors: leave variant='x' out, or"):
        bertfast.AutoModel.from_pretrained(folder, variant="x")
    model.save_pretrained(folder, variant="x")
    assert has_int8(bertfast.AutoModel.from_pretrained(folder, variant="x"))


def test_a_head_of_another_size_is_refused_unless_it_is_asked_for(folder):
    kind = bertfast.BertForSequenceClassification
    with refuses(folder, "to the weights, or pass ignore_mismatched_sizes=True for a new head"):
        kind.from_pretrained(folder, num_labels=7)
    opened = kind.from_pretrained(folder, num_labels=7, ignore_mismatched_sizes=True)
    assert opened.classifier.out_features == 7
    assert has_int8(opened)
    change_config(folder, vocab_size=9)
    with refuses(folder, "embeddings.word_embeddings.weight has shape ["):
        kind.from_pretrained(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("kind", [bertfast.AutoModel, bertfast.BertModel])
@torch.no_grad()
def test_a_configuration_is_given_as_a_path(kind, folder):
    values = {name: x for name, x in batch().items() if name != "labels"}
    expected = kind.from_pretrained(folder)(**values)[0]
    shutil.copy(folder / "config.json", folder.with_name("other.json"))
    for config in (folder, str(folder), folder / "config.json", str(folder.with_name("other.json"))):
        opened, info = kind.from_pretrained(folder, config=config, output_loading_info=True)
        assert torch.equal(opened(**values)[0], expected)
        assert not info["missing_keys"]
    change_config(folder, num_hidden_layers=3)
    with refuses(folder, "lacks weights that its config.json describes, encoder.layer.2."):
        kind.from_pretrained(folder, config=transformers.BertConfig.from_pretrained(folder))
    with pytest.raises(TypeError, match="config must be a configuration or the path of one, got a dict"):
        kind.from_pretrained(folder, config={})
