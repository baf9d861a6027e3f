"""Configurations and dtypes of quantised models: what is saved and opened is what the model is."""

import json

import pytest
import torch
import transformers
from live_models import batch, live
from parity import SIZES

import bertfast
from bertfast.encoder.packed_linear import frozen_precision, is_frozen


def test_a_configuration_that_another_model_shares_stays_as_it_is(tmp_path):
    config = transformers.BertConfig(**SIZES)
    first, second = bertfast.BertForSequenceClassification(config), bertfast.BertForSequenceClassification(config)
    bertfast.quantize(first, [batch()])
    assert not hasattr(second.config, "quantization_config")
    assert first.config is first.bert.config  # its own modules still share one
    assert first.bert.encoder.config is first.config
    assert first.config is not config
    second.save_pretrained(tmp_path)
    assert not is_frozen(bertfast.AutoModel.from_pretrained(tmp_path))
    transformers.BertForSequenceClassification.from_pretrained(tmp_path)


def test_a_new_model_of_a_quantised_ones_configuration_is_saved_as_what_it_is(tmp_path):
    quantised = live()
    bertfast.quantize(quantised)
    bertfast.BertForMaskedLM(quantised.config).save_pretrained(tmp_path / "new")
    assert "quantization_config" not in json.loads((tmp_path / "new" / "config.json").read_text())
    transformers.BertForMaskedLM.from_pretrained(tmp_path / "new")
    quantised.save_pretrained(tmp_path / "int8")
    assert is_frozen(bertfast.AutoModel.from_pretrained(tmp_path / "int8"))


def test_opening_leaves_the_configuration_that_is_given_as_it_is(tmp_path):
    model = live("BertModel")
    bertfast.quantize(model)
    model.save_pretrained(tmp_path)
    config = transformers.BertConfig.from_pretrained(tmp_path)
    bertfast.BertModel.from_pretrained(tmp_path, config=config)
    assert hasattr(config, "quantization_config")


@pytest.mark.parametrize("kind", [bertfast.AutoModel, bertfast.BertModel])
def test_weights_of_another_kind_are_refused(kind, tmp_path):
    model = live("BertModel")
    bertfast.quantize(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"weights": "int8"', '"weights": "int4"'))
    with pytest.raises(ValueError, match="quantization_config has weights 'int4', and this version of bertfast opens"):
        kind.from_pretrained(tmp_path)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("kind", [bertfast.AutoModel, bertfast.BertModel])
@pytest.mark.filterwarnings("ignore:.*torch_dtype")
def test_dtypes_of_a_quantised_folder_are_those_of_transformers(kind, name, stored, tmp_path):
    model = live("BertModel").to(stored)
    bertfast.quantize(model)
    model.save_pretrained(tmp_path)
    for requested, expected in (("auto", stored), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        opened = kind.from_pretrained(tmp_path, **{name: requested})
        assert opened.dtype == expected
        assert opened.config.dtype == expected
        assert frozen_precision(opened) == "int8"
    with pytest.raises(
        ValueError, match=r"is torch.float16: frozen models are .*load the model with dtype=torch.float"
    ):
        kind.from_pretrained(tmp_path, **{name: torch.float16})
