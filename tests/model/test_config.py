"""Configurations of transformers, read and changed by programs."""

import json
import re
from pathlib import Path

import pytest
import transformers
from parity import SIZES

import bertfast
from bertfast.models.extensions import ExtendedBertConfig
from bertfast.models.files import class_named_by, read_config, resolve


def test_the_configuration_is_that_of_transformers():
    assert bertfast.BertConfig is transformers.BertConfig


def test_unknown_entries_are_kept(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 24, "my_note": [1, "two"]}))
    read_config(tmp_path).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["my_note"] == [1, "two"]


def test_changes_override_the_file(tmp_path):
    bertfast.BertConfig(**SIZES).save_pretrained(tmp_path)
    config = read_config(tmp_path, num_labels=7, hidden_dropout_prob=0, unanswerable=True)
    assert (config.num_labels, len(config.id2label), config.hidden_dropout_prob) == (7, 7, 0)
    assert config.unanswerable
    assert config.hidden_size == SIZES["hidden_size"]
    named = read_config(tmp_path, num_labels=2, id2label={0: "no", 1: "yes"})
    assert (named.num_labels, named.id2label, named.label2id) == (2, {0: "no", 1: "yes"}, {"no": 0, "yes": 1})


def test_extensions_have_their_own_model_type_and_are_kept(tmp_path):
    bertfast.BertConfig(**SIZES).save_pretrained(tmp_path)
    read_config(tmp_path, bilstm=True, lstm_size=7).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert type(config) is ExtendedBertConfig
    assert (config.bilstm, config.pool_last, config.lstm_size) == (True, False, 7)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] not in transformers.CONFIG_MAPPING


@pytest.mark.parametrize(
    ("name", "layers", "hidden"),
    [("tiny", 2, 128), ("mini", 4, 256), ("small", 4, 512), ("medium", 8, 512), ("base", 12, 768), ("large", 24, 1024)],
)
def test_presets_have_the_published_sizes(name, layers, hidden):
    config = bertfast.preset_config(name, vocab_size=64)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (layers, hidden, 4 * hidden)
    assert (config.hidden_size // config.num_attention_heads, config.vocab_size) == (64, 64)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="the configuration of a 'gpt2' model, not of a BERT"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="there is no preset 'huge': use one of tiny, mini, small, medium, base"):
        bertfast.preset_config("huge")
    with pytest.raises(ValueError, match="names MyBert, which is none of BertForMaskedLM"):
        class_named_by(bertfast.BertConfig(architectures=["MyBert"]), Path("folder"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ('{"hidden_size": 24', "is cut off or not JSON"),
        ("[1]", r"must hold a JSON object, {…}, got \[1\]"),
        ('{"a":' * 100_000, "is cut off or not JSON"),
        (b'{"note": "\xe9"}', "line 1: not UTF-8"),
        ('{"hidden_size": 24}'.encode("utf-16"), "is UTF-16; convert the file to UTF-8"),
        ("version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
        ('{"hidden_size": "24"}', "hidden_size must be a whole number from 1 to"),
        ('{"vocab_size": -1}', "vocab_size must be a whole number"),
        ('{"hidden_size": 1000000000000}', "hidden_size must be a whole number"),
        ('{"num_hidden_layers": 1000000000}', "num_hidden_layers must be a whole number"),
        ('{"hidden_size": 30, "num_attention_heads": 4}', "must be a multiple of num_attention_heads, got 30 and 4"),
        ('{"id2label": ["a", "b"]}', "is not the configuration of a BERT"),
        ('{"layer_norm_eps": -1}', "layer_norm_eps must be a number at least 0, got -1"),
        ('{"hidden_dropout_prob": 7}', "hidden_dropout_prob must be a number at least 0 and less than 1, got 7"),
        ('{"hidden_act": "none"}', "hidden_act must name an activation, such as gelu, got 'none'"),
        ('{"problem_type": "none"}', "problem_type.*regression.*single_label_classification.*multi"),
        ('{"pad_token_id": 1000000}', "pad_token_id must be from 0 to 30521, the last token of the vocabulary"),
    ],
)
def test_a_damaged_configuration_is_refused_by_name(content, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message) as raised:
        read_config(tmp_path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_configuration_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 24, "note": "é"}), encoding="utf-8-sig")
    assert read_config(tmp_path, num_attention_heads=2).hidden_size == 24


def test_a_file_in_place_of_a_model_folder_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="is a file; a model is a folder"):
        resolve(file)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"id2label": {"0": "a", "1": "a"}}, "id2label calls both 0 and 1 'a': rename one"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label must name the labels 0 to 1, and has no 1: number them from 0"),
        ({"id2label": {"1": "a", "2": "b"}}, "id2label must name the labels 0 to 1, and has no 0"),
        ({"id2label": {"0": "a", "9" * 5000: "b"}}, "id2label must name the labels 0 to 1, and has no 1"),
        ({"id2label": {"0": "a", "1": None}}, "id2label names 1 None: write it as a text, in quotes"),
        ({"id2label": {"0": "a", "1": ["b"]}}, "id2label names 1 ['b']: write it as a text"),
        ({"finetuning_task": ["mrpc"]}, "finetuning_task must be the name of a task, got ['mrpc']"),
        ({"finetuning_task": 3}, "finetuning_task must be the name of a task, got 3"),
    ],
)
def test_labels_and_tasks_that_are_no_names_are_refused(entries, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=re.escape(f"config.json: {message}")):
        read_config(tmp_path)
