"""Files: what one side saves the other opens with the same numbers; what does not fit is named."""

import json
import logging

import pytest
import torch
from parity import CASES, SIZES, inputs, models, transformers
from safetensors.torch import load_file, save_file

import bertfast.models

BY_NAME = {case.name: case for case in CASES}
MASKED_LM = BY_NAME["masked_lm"]


def outputs(model, case) -> dict:
    values = inputs(case, "right")
    dtype = model.get_input_embeddings().weight.dtype
    return dict(model(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in values.items()}).items())


def assert_same_numbers(ours, theirs, case) -> None:
    parameters = theirs.state_dict()
    if not theirs.config.tie_word_embeddings:
        del parameters["cls.predictions.bias"]  # theirs keeps one that nothing reads
    own = ours.state_dict()
    for name, x in parameters.items():
        assert torch.equal(own[name], x), name
    mask = inputs(case, "right")["attention_mask"].bool()
    expected = outputs(theirs, case)
    for name, x in outputs(ours, case).items():
        if name == "loss" and case.name == "question":
            continue  # Hugging Face's counts padding in
        here = mask if x.shape[:2] == mask.shape else ...
        torch.testing.assert_close(x[here], expected[name][here], atol=2e-5, rtol=2e-5)


@pytest.fixture
def folder(tmp_path):
    """A masked-LM model's folder, as transformers writes it."""
    models(MASKED_LM)[1].save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change) -> None:
    """Replace the weights of a folder by what `change` makes of them."""
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ours_opens_in_transformers(case, tmp_path):
    ours, _ = models(case)
    ours.save_pretrained(tmp_path)
    theirs, report = getattr(transformers, case.class_name).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager", **case.arguments
    )
    assert not any(report.values()), report
    assert_same_numbers(ours, theirs.eval(), case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_theirs_opens_here(case, tmp_path, caplog):
    _, theirs = models(case)
    theirs.save_pretrained(tmp_path)
    caplog.clear()
    if case.name == "no_pooler":
        with caplog.at_level(logging.WARNING):
            ours = bertfast.models.BertModel.from_pretrained(tmp_path)
        assert "has no pooler.dense.weight, pooler.dense.bias: newly initialised" in caplog.text
        return
    ours = getattr(bertfast.models, case.class_name).from_pretrained(tmp_path)
    assert not caplog.text
    assert not ours.training
    assert_same_numbers(ours, theirs, case)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_read(suffix, folder, caplog):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = sorted(weights)
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"{stem}-{number:05}-of-00002.{suffix}"
        where |= dict.fromkeys(part, shard)
        (save_file if suffix == "safetensors" else torch.save)({name: weights[name] for name in part}, folder / shard)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
    ours = bertfast.models.BertForMaskedLM.from_pretrained(folder)
    assert not caplog.text
    for name, x in weights.items():
        assert torch.equal(ours.state_dict()[name], x)
    (folder / f"{stem}-00002-of-00002.{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {stem}-00002-of-00002.{suffix}"):
        bertfast.models.BertForMaskedLM.from_pretrained(folder)


def test_old_files_are_read(folder, caplog):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in weights.items()
    }
    assert any("gamma" in name for name in old)
    old["bert.embeddings.position_ids"] = torch.arange(16)[None]
    torch.save(old, folder / "pytorch_model.bin")
    ours = bertfast.models.BertForMaskedLM.from_pretrained(folder)
    assert not caplog.text
    assert_same_numbers(ours, models(MASKED_LM)[1], MASKED_LM)


def test_a_pickle_that_holds_more_than_tensors_is_not_run(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"run": print}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds other things than weights"):
        bertfast.models.BertForMaskedLM.from_pretrained(folder)


def test_missing_and_extra_heads_are_named(folder, caplog):
    model = bertfast.models.BertForSequenceClassification.from_pretrained(folder)
    missing, extra = (record.getMessage() for record in caplog.records)
    assert "has no bert.pooler.dense.weight, bert.pooler.dense.bias, classifier.weight, classifier.bias" in missing
    assert "also holds cls.predictions.bias" in extra
    assert extra.endswith("not used by BertForSequenceClassification")
    assert model.classifier.weight.std() > 0
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, models(MASKED_LM)[0].get_input_embeddings().weight)


def test_a_bare_encoder_opens_under_a_head_and_the_other_way_round(tmp_path, caplog):
    encoder, _ = models(BY_NAME["no_pooler"])
    encoder.save_pretrained(tmp_path)
    model = bertfast.models.BertForTokenClassification.from_pretrained(tmp_path)
    assert [record.getMessage().split(" has no ")[1] for record in caplog.records] == [
        "classifier.weight, classifier.bias: newly initialised"
    ]
    model.save_pretrained(tmp_path)
    again = bertfast.models.BertModel.from_pretrained(tmp_path)
    for name, x in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], x)


@pytest.mark.parametrize("key", ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.output.dense.weight"])
def test_another_size_is_refused_by_name(folder, key):
    rewrite(folder, lambda weights: weights | {key: weights[key][:-1].contiguous()})
    with pytest.raises(ValueError, match=f"is of another size: its {key} is"):
        bertfast.models.BertForMaskedLM.from_pretrained(folder)


def test_a_layer_that_the_config_does_not_have_is_named(folder, caplog):
    bertfast.models.BertForMaskedLM.from_pretrained(folder, num_hidden_layers=1)
    assert "also holds bert.encoder.layer.1." in caplog.text


def test_what_is_not_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        bertfast.models.BertModel.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        bertfast.models.BertModel.from_pretrained(tmp_path)
    bertfast.models.BertConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no weights: neither model.safetensors nor pytorch_model.bin"):
        bertfast.models.BertModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or holds other things"):
        bertfast.models.BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_ties_survive_moving_saving_and_loading(tied, tmp_path):
    model, _ = models(BY_NAME["pretraining"], tie_word_embeddings=tied)

    def is_tied(model) -> bool:
        return model.cls.predictions.decoder.weight is model.get_input_embeddings().weight

    assert is_tied(model) == tied
    model.to(torch.float64).to(torch.float32)
    assert is_tied(model) == tied
    model.save_pretrained(tmp_path)
    assert ("cls.predictions.decoder.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    again = bertfast.models.BertForPreTraining.from_pretrained(tmp_path)
    assert is_tied(again) == tied
    assert again.cls.predictions.bias is again.cls.predictions.decoder.bias
    assert len(list(again.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("name", "class_name", "vocabulary"),
    [("bert-xsmall-dummy", "BertModel", 250), ("camphr-ner-bert", "BertForTokenClassification", 402)],
)
def test_checkpoints_from_elsewhere(name, class_name, vocabulary, shared_data):
    folder = shared_data / "checkpoint" / name
    ours = getattr(bertfast.models, class_name).from_pretrained(folder)
    theirs = getattr(transformers, class_name).from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.arange(24).view(2, 12) * 7 % vocabulary
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    expected = theirs(ids, attention_mask=mask)
    for key, x in ours(ids, attention_mask=mask).items():
        here = mask.bool() if x.shape[:2] == mask.shape else ...
        torch.testing.assert_close(x[here], expected[key][here])
    assert ours.config.id2label == theirs.config.id2label
