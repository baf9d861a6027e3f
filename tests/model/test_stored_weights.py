"""Checkpoints whose tensors are not plain floating point, or are not those that config.json describes, are refused."""

import pytest
import torch
from checkpoints import rewrite
from safetensors.torch import load_file, save_file

import bertfast
from bertfast.models.files import load


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_not_plain_floating_point_are_refused(file, dtype, folder):
    key = "bert.encoder.layer.0.output.dense.weight"
    weights = load_file(folder / "model.safetensors")
    weights |= {key: weights[key].to(dtype), "bert.embeddings.position_ids": torch.arange(8)}
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / file, {"format": "pt"}) if file.endswith("safetensors") else torch.save(
        weights, folder / file
    )
    with pytest.raises(ValueError, match=f"{key} is stored as {str(dtype)[6:]}, and only float16.*before it was quant"):
        load(bertfast.BertForMaskedLM, folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_every_plain_floating_point_type_are_read(dtype, folder):
    rewrite(folder, lambda weights: {key: value.to(dtype) for key, value in weights.items()})
    model, missing, _ = load(bertfast.BertForMaskedLM, folder)
    assert not missing
    assert {x.dtype for x in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("sparse", lambda x: x.to_sparse()),
        ("meta", lambda x: x.to("meta")),
        ("nested", lambda x: torch.nested.nested_tensor([*x])),
    ],
)
def test_tensors_without_dense_values_are_refused(kind, change, folder):
    key = "bert.encoder.layer.0.output.dense.weight"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights | {key: change(weights[key])}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"pytorch_model.bin holds {key} as a {kind}.* tensor: save it with values"):
        load(bertfast.BertForMaskedLM, folder)


@pytest.mark.parametrize(
    "key", ["bert.encoder.layer.9.output.dense.bias", "bert.encoder.layer.0.attention.self.distance_embedding.weight"]
)
def test_weights_of_the_encoder_that_the_model_does_not_use_are_refused(key, folder):
    rewrite(folder, lambda weights: weights | {key: torch.zeros(4), "classifier.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=f"has weights that its config.json does not describe, {key}: take the config"):
        load(bertfast.BertForMaskedLM, folder)
