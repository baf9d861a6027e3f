"""Saved models open in transformers and the other way round; messages name what does not fit."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import MASKED_LM, rewrite
from parity import CASES, SIZES, models
from safetensors.torch import load_file, save_file

import bertfast
from bertfast.models.files import load, report_differences, save

BY_NAME = {case.name: case for case in CASES}


def assert_same_weights(model, other) -> None:
    for name, x in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], x), name


@pytest.mark.parametrize("gathered", [False, True], ids=["own tensors", "gathered"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_saved_model_opens_in_transformers(case, gathered, tmp_path):
    """Also if each name has its own tensor, as after gathering shards of several ranks."""
    fused, _ = models(case)
    save(fused, tmp_path, {name: x.clone() for name, x in fused.state_dict().items()} if gathered else None)
    hf, report = getattr(transformers, case.class_name).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager", **case.arguments
    )
    assert not any(report.values()), report
    assert_same_weights(fused, hf.eval())
    tied = "cls.predictions.decoder.weight" in fused.state_dict() and fused.config.tie_word_embeddings
    assert ("cls.predictions.decoder.weight" in load_file(tmp_path / "model.safetensors")) == (
        "cls.predictions.decoder.weight" in fused.state_dict() and not tied
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_saved_by_transformers_opens(case, tmp_path):
    _, hf = models(case)
    hf.save_pretrained(tmp_path)
    fused, missing, unexpected = load(getattr(bertfast, case.class_name), tmp_path)
    assert not unexpected
    assert missing == (["pooler.dense.weight", "pooler.dense.bias"] if case.name == "no_pooler" else [])
    assert not fused.training
    assert_same_weights(fused, hf)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_read(suffix, folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = sorted(weights)
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"{stem}-{number:05}-of-00002.{suffix}"
        where |= dict.fromkeys(part, shard)
        (save_file if suffix == "safetensors" else torch.save)({name: weights[name] for name in part}, folder / shard)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    fused, *differences = load(bertfast.BertForMaskedLM, folder)
    assert differences == [[], []]
    for name, x in weights.items():
        assert torch.equal(fused.state_dict()[name], x)
    (folder / f"{stem}-00002-of-00002.{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{stem}-00002-of-00002.{suffix}"):
        load(bertfast.BertForMaskedLM, folder)


def test_old_files_are_read(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in weights.items()
    }
    assert any("gamma" in name for name in old)
    old["bert.embeddings.position_ids"] = torch.arange(16)[None]
    torch.save(old, folder / "pytorch_model.bin")
    fused, *differences = load(bertfast.BertForMaskedLM, folder)
    assert differences == [[], []]
    assert_same_weights(fused, models(MASKED_LM)[1])


PREFIXES = ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_weights_saved_from_a_wrapped_model_are_read(prefix, folder):
    rewrite(folder, lambda weights: {prefix + name: x for name, x in weights.items()})
    fused, *differences = load(bertfast.BertForMaskedLM, folder)
    assert differences == [[], []]
    assert_same_weights(fused, models(MASKED_LM)[1])
    encoder, *_ = load(bertfast.BertModel, folder)
    assert_same_weights(encoder.encoder, models(MASKED_LM)[1].bert.encoder)


@pytest.mark.parametrize("wrapped", [("state_dict",), ("model_state_dict",), ("model", "state_dict")])
def test_weights_inside_a_training_state_are_read(wrapped, folder):
    state = {f"module.{name}": x for name, x in load_file(folder / "model.safetensors").items()}
    for key in wrapped:
        state = {"epoch": 3, key: state, "optimizer": {"state": {}}}
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    fused, *differences = load(bertfast.BertForMaskedLM, folder)
    assert differences == [[], []]
    assert_same_weights(fused, models(MASKED_LM)[1])


def test_weights_of_compiled_layers_are_read(folder):
    rewrite(folder, lambda weights: {name.replace("layer.1.", "layer.1._orig_mod."): x for name, x in weights.items()})
    fused, *differences = load(bertfast.BertForMaskedLM, folder)
    assert differences == [[], []]
    assert_same_weights(fused, models(MASKED_LM)[1])


@pytest.mark.parametrize("rename", [lambda name: f"student.{name}", lambda name: name.replace("encoder", "blocks")])
def test_a_checkpoint_without_weights_of_the_encoder_is_refused(rename, folder):
    rewrite(folder, lambda weights: {rename(name): x for name, x in weights.items() if "embeddings" not in name})
    for kind in (bertfast.BertForMaskedLM, bertfast.BertForSequenceClassification, bertfast.BertModel):
        with pytest.raises(ValueError, match=f"has no weights of an encoder.*{rename('bert.encoder')}") as raised:
            load(kind, folder)
        assert str(folder) in str(raised.value)


def test_two_weights_of_one_name_are_refused(folder):
    key = "cls.predictions.bias"
    rewrite(folder, lambda weights: weights | {f"module.{key}": weights[key] + 1})
    with pytest.raises(ValueError, match=f"holds two different weights {key}"):
        load(bertfast.BertForMaskedLM, folder)


def test_tied_weights_that_differ_are_kept_apart(folder, tmp_path, caplog):
    decoder = "cls.predictions.decoder.weight"
    other = torch.randn(models(MASKED_LM)[0].get_input_embeddings().weight.shape)
    rewrite(folder, lambda weights: weights | {decoder: other})
    model, *differences = load(bertfast.BertForMaskedLM, folder)
    assert differences == [[], []]
    assert f"{decoder} that differs from its word embeddings" in caplog.text
    save(model, tmp_path / "again")
    caplog.clear()
    again, *_ = load(bertfast.BertForMaskedLM, tmp_path / "again")
    assert not caplog.records
    for opened in (model, again):
        assert torch.equal(opened.get_output_embeddings().weight, other)
        assert torch.equal(opened.get_output_embeddings().bias, models(MASKED_LM)[1].cls.predictions.bias)
        assert_same_weights(opened.bert, models(MASKED_LM)[1].bert)
    classifier, *_ = load(bertfast.BertForSequenceClassification, folder)
    assert classifier.config.tie_word_embeddings
    assert not caplog.records


def test_embeddings_saved_under_the_decoder_alone_are_read(folder):
    embeddings, decoder = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    rewrite(folder, lambda weights: {decoder if name == embeddings else name: x for name, x in weights.items()})
    fused, *differences = load(bertfast.BertForMaskedLM, folder)
    assert differences == [[], []]
    assert_same_weights(fused, models(MASKED_LM)[1])


def test_a_pickle_that_holds_more_than_tensors_is_not_run(folder, tmp_path):
    class Program:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (folder / "model.safetensors").unlink()
    for content in (Program(), {"state_dict": {"a": Program()}}, {"run": print}):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(
            ValueError, match=r"pytorch_model.bin is damaged or holds other things than weights"
        ) as raised:
            load(bertfast.BertForMaskedLM, folder)
        assert "weights_only" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [torch.ones(3), [torch.ones(3)], {"bert.weight": 1.0}, {"state_dict": {"x": "y"}}])
def test_a_file_of_other_objects_is_refused(content, folder):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin holds .*: save a state_dict"):
        load(bertfast.BertForMaskedLM, folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(value, folder):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("query.weight"))
    weights[name][1, 1] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} has values that are NaN or infinite"):
        load(bertfast.BertForMaskedLM, folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-100], "is damaged or"),
        (lambda content: content[: len(content) // 2], "is damaged or"),
        (lambda content: content[:5], "is damaged or"),
        (lambda content: b"\xff" * 64 + content[64:], "is damaged or"),
        (lambda content: b"<!DOCTYPE html><html>not found</html>", "is damaged or"),
        (lambda content: b"", "is empty"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ],
)
def test_damaged_weights_are_refused_by_name(name, damage, message, folder):
    weights = load_file(folder / "model.safetensors")
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / name)
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=message) as raised:
        load(bertfast.BertForMaskedLM, folder)
    assert f"{folder / name} is" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"weight_map": {"a": "../secret.safetensors"}},
            r"names '../secret.safetensors': only files in its own folder",
        ),
        ({"weight_map": {"a": "/etc/passwd"}}, "only files in its own folder"),
        ({"weight_map": {"a": "gone.safetensors"}}, r"gone.safetensors is missing, although model.safetensors.index"),
        ({"weight_map": {"a": "weights.safetensors"}}, "says that weights.safetensors holds a, but it does not"),
        ({"weight_map": {"a": 3}}, "has no weight_map"),
        ({}, "has no weight_map"),
        ([], "must hold a JSON object"),
    ],
)
def test_an_index_that_does_not_match_its_shards_is_refused(index, message, folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(bertfast.BertForMaskedLM, folder)


@pytest.mark.parametrize(
    "absent", ["bert.encoder.layer.1.", "bert.encoder.layer.0.output.dense.bias", "bert.embeddings.pos"]
)
def test_a_checkpoint_with_a_part_of_the_encoder_is_refused(absent, folder):
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith(absent)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks weights that its config.json describes, {absent}.*: take the config"):
        load(bertfast.BertForMaskedLM, folder)


def test_missing_and_extra_heads_are_named(folder, caplog):
    model, missing, unexpected = load(bertfast.BertForSequenceClassification, folder)
    report_differences(model, "it", missing, unexpected)
    first, second = (record.getMessage() for record in caplog.records)
    assert "it has no bert.pooler.dense.weight, bert.pooler.dense.bias, classifier.weight, classifier.bias" in first
    assert "also holds cls.predictions.bias" in second
    assert second.endswith("not used by BertForSequenceClassification")
    assert 0 < model.classifier.weight.abs().max() <= 2 * model.config.initializer_range
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, models(MASKED_LM)[0].get_input_embeddings().weight)


def test_a_bare_encoder_opens_under_a_head_and_the_other_way_round(tmp_path):
    encoder, _ = models(BY_NAME["no_pooler"])
    encoder.save_pretrained(tmp_path)
    model, missing, unexpected = load(bertfast.BertForTokenClassification, tmp_path)
    assert (missing, unexpected) == (["classifier.weight", "classifier.bias"], [])
    save(model, tmp_path)
    again, *_ = load(bertfast.BertModel, tmp_path)
    for name, x in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], x)


def test_a_head_of_another_task_is_initialised_as_without_a_checkpoint(tmp_path):
    model, _ = models(BY_NAME["token"])
    save(model, tmp_path)
    torch.manual_seed(3)
    again, missing, _ = load(bertfast.BertForTokenClassification, tmp_path, fresh=("classifier.",))
    assert not missing
    assert not torch.equal(again.classifier.weight, model.classifier.weight)
    assert again.classifier.weight.abs().max() <= 2 * again.config.initializer_range
    assert not again.classifier.bias.any()
    assert_same_weights(again.bert, model.bert)


@pytest.mark.parametrize("key", ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.output.dense.weight"])
def test_another_size_is_refused_by_name(folder, key):
    rewrite(folder, lambda weights: weights | {key: weights[key][:-1].contiguous()})
    with pytest.raises(ValueError, match=rf"{key} has shape \[\d+, \d+\], but config.json implies \["):
        load(bertfast.BertForMaskedLM, folder)


def test_what_is_not_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load(bertfast.BertModel, tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        load(bertfast.BertModel, tmp_path)
    bertfast.BertConfig(**SIZES).save_pretrained(tmp_path)
    for name, remedy in (
        ("config.json", "there must be a model.safetensors or a pytorch_model.bin"),
        ("tf_model.h5", "those of TensorFlow and Flax are not read"),
        ("bert_model.ckpt.index", "with `bertfast import`"),
    ):
        (tmp_path / name).touch()
        with pytest.raises(FileNotFoundError, match=f"holds no weights: .*{remedy}"):
            load(bertfast.BertModel, tmp_path)
    pytest.importorskip("peft")
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ValueError, match=r"holds adapter_config\.json and no adapter_model\.safetensors: save"):
        load(bertfast.BertModel, tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load(bertfast.BertModel, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    with pytest.raises(ValueError, match="names no model as its base_model_name_or_path: add that"):
        load(bertfast.BertModel, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_ties_survive_moving_saving_and_loading(tied, tmp_path):
    model, _ = models(BY_NAME["pretraining"], tie_word_embeddings=tied)

    def is_tied(model) -> bool:
        return model.cls.predictions.decoder.weight is model.get_input_embeddings().weight

    assert is_tied(model) == tied
    model.to(torch.float64).to(torch.float32)
    assert is_tied(model) == tied
    save(model, tmp_path)
    assert ("cls.predictions.decoder.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    again, *_ = load(bertfast.BertForPreTraining, tmp_path)
    assert is_tied(again) == tied
    assert len(list(again.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("name", "class_name", "vocabulary"),
    [("bert-xsmall-dummy", "BertModel", 250), ("camphr-ner-bert", "BertForTokenClassification", 402)],
)
def test_checkpoints_of_other_formats(name, class_name, vocabulary, shared_data):
    folder = shared_data / "checkpoint" / name
    fused, *_ = load(getattr(bertfast, class_name), folder)
    hf = (
        getattr(transformers, class_name)
        .from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
        .eval()
    )
    ids = torch.arange(24).view(2, 12) * 7 % vocabulary
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    expected = hf(ids, attention_mask=mask)
    for key, x in fused(ids, attention_mask=mask).items():
        here = mask.bool() if x.shape[:2] == mask.shape else ...
        torch.testing.assert_close(x[here], expected[key][here])
    assert fused.config.id2label == hf.config.id2label
