"""BertConfig reads and writes Hugging Face's config.json."""

import json

import pytest
from parity import SIZES, transformers

from bertfast.models import BertConfig

SHARED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size"),
    *("initializer_range", "layer_norm_eps", "pad_token_id", "classifier_dropout", "tie_word_embeddings"),
    *("is_decoder", "problem_type", "num_labels", "id2label", "label2id", "return_dict"),
    *("output_hidden_states", "output_attentions"),
)


def assert_same(ours, theirs) -> None:
    for name in SHARED:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_defaults_are_theirs():
    assert_same(BertConfig(), transformers.BertConfig())


@pytest.mark.parametrize(
    "changes", [{}, {"num_labels": 1, "problem_type": "regression"}, {"id2label": {0: "no", 1: "yes", 2: "perhaps"}}]
)
def test_either_reads_the_other(changes, tmp_path):
    sizes = {**SIZES, "classifier_dropout": 0.3, "is_decoder": True, "hidden_act": "gelu_new"}
    sizes = {name: value for name, value in sizes.items() if name != "num_labels"} | changes
    ours = BertConfig(**sizes)
    ours.save_pretrained(tmp_path, "BertForMaskedLM")
    theirs = transformers.BertConfig.from_pretrained(tmp_path)
    assert_same(ours, theirs)
    assert theirs.architectures == ["BertForMaskedLM"]
    theirs.save_pretrained(tmp_path)
    assert_same(BertConfig.from_pretrained(tmp_path), theirs)


def test_what_is_not_ours_survives(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 24, "my_note": [1, "two"]}))
    BertConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["my_note"] == [1, "two"]
    assert "return_logits" not in written


def test_changes_override_the_file(tmp_path):
    BertConfig(**SIZES).save_pretrained(tmp_path)
    config = BertConfig.from_pretrained(tmp_path, num_labels=7, hidden_dropout_prob=0)
    assert (config.num_labels, len(config.id2label), config.hidden_dropout_prob) == (7, 7, 0)
    assert config.hidden_size == SIZES["hidden_size"]


@pytest.mark.parametrize(
    ("name", "layers", "hidden"),
    [("tiny", 2, 128), ("mini", 4, 256), ("small", 4, 512), ("medium", 8, 512), ("base", 12, 768), ("large", 24, 1024)],
)
def test_presets_have_the_published_sizes(name, layers, hidden):
    config = BertConfig.preset(name, vocab_size=64)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (layers, hidden, 4 * hidden)
    assert (config.head_dimension, config.vocab_size) == (64, 64)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
        ({"hidden_act": "mish"}, "hidden_act must be one of gelu, .*, got 'mish'"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be in \[0, 1\), got 1.0"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob must be in"),
        ({"classifier_dropout": 2}, "classifier_dropout must be in"),
    ],
)
def test_what_cannot_be_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        BertConfig(**changes)


def test_foreign_and_unknown_names_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="the configuration of a 'gpt2' model, not of a BERT"):
        BertConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no preset 'huge'; presets are tiny, mini, small, medium, base, large"):
        BertConfig.preset("huge")
