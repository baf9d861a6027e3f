"""The side at which a tokenizer truncates, and the length of its model, against transformers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from family_models import write_model
from transformers import AutoConfig, AutoTokenizer

from bertfast.data.tokenizer import encode_sentences, load_tokenizer, save_tokenizer, train_tokenizer
from bertfast.data.truncation import truncation_side
from bertfast.models.tokenizers import copy_tokenizer, load_any_tokenizer, save_model_tokenizer
from bertfast.tasks.features import tokenize
from bertfast.tasks.question_answering import QuestionAnsweringTask, Questions
from bertfast.tasks.rows import Rows
from bertfast.tasks.settings import TaskSettings
from bertfast.tasks.squad import Question

TEXTS = ["a b c d e f g h", "b", "c d a h g f e", ""]


def write_tokenizer(folder, **options):
    """Write a WordPiece tokenizer with these options of tokenizer_config.json, and return its folder."""
    folder.mkdir()
    save_tokenizer(train_tokenizer(TEXTS, 64), folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    return folder


def rows_of(features):
    return [part.tolist() for part in np.split(features.token_ids, features.cu_seqlens[1:-1])]


@pytest.mark.parametrize("family", ["electra", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pairs", [False, True])
def test_texts_are_truncated_at_the_side_that_transformers_takes(family, side, pairs, tmp_path):
    folder = write_model(family, tmp_path / "model", TEXTS * 10)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"truncation_side": side}))
    hf = AutoTokenizer.from_pretrained(folder)
    others = TEXTS[::-1] if pairs else None
    expected = hf(TEXTS, others, truncation=True, max_length=8)["input_ids"]
    tokenizer = load_any_tokenizer(folder)
    texts = [*zip(TEXTS, others, strict=True)] if pairs else TEXTS
    for _ in range(2):  # the first call leaves the side as it is
        features = tokenize(tokenizer, texts, 8)
        assert rows_of(features) == expected
        assert features.num_truncated > 0
    assert truncation_side(tokenizer) == side
    assert tokenizer.encode(TEXTS[0]).ids == hf(TEXTS[0])["input_ids"]  # nothing is truncated without a length


def test_the_side_of_a_tokenizer_json_counts_unless_the_configuration_has_one(tmp_path):
    folder = write_tokenizer(tmp_path / "a")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Left", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    assert truncation_side(tokenizer) == AutoTokenizer.from_pretrained(folder).truncation_side == "left"
    assert len(tokenizer.encode(TEXTS[0]).ids) == 10
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"truncation_side": "right"}))
    assert truncation_side(load_tokenizer(folder)) == AutoTokenizer.from_pretrained(folder).truncation_side == "right"


def test_the_side_is_saved_and_a_maximum_length_is_not(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "a", truncation_side="left"))
    save_tokenizer(tokenizer, tmp_path / "b")
    assert truncation_side(tokenizer) == truncation_side(load_tokenizer(tmp_path / "b")) == "left"
    opened = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert opened.truncation_side == "left"
    assert opened.model_max_length > 2**31
    assert json.loads((tmp_path / "b" / "tokenizer.json").read_text())["truncation"] is None


@pytest.mark.parametrize("length", [12, None])
def test_the_maximum_length_of_a_model_is_kept_with_its_tokenizer(length, tmp_path):
    source = write_tokenizer(tmp_path / "a", truncation_side="right")
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": length or 10**30}))
    (tmp_path / "b").mkdir()
    copy_tokenizer(load_tokenizer(source), source, tmp_path / "b")
    found = AutoTokenizer.from_pretrained(tmp_path / "b").model_max_length
    assert found == length if length else found > 2**31


@pytest.mark.parametrize(("family", "padding"), [("bert", 0), ("roberta", 2)])
def test_the_tokenizer_of_a_new_model_truncates_to_its_positions(family, padding, tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "a", truncation_side="right"))
    (tmp_path / "b").mkdir()
    config = AutoConfig.for_model(family, max_position_embeddings=20, pad_token_id=padding)
    save_model_tokenizer(tokenizer, tmp_path / "b", config)
    opened = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert opened.model_max_length == {"bert": 20, "roberta": 17}[family]
    assert len(opened(TEXTS[0] * 9, truncation=True).input_ids) == opened.model_max_length


def test_windows_of_contexts_and_sentences_for_pretraining_are_whole(tmp_path):
    left, right = (load_tokenizer(write_tokenizer(tmp_path / side, truncation_side=side)) for side in ("left", "right"))
    assert [*encode_sentences(left, TEXTS)] == [*encode_sentences(right, TEXTS)]
    question = Question("1", "a b", TEXTS[0] * 4, ())
    questions = Questions([question], Rows("file", [1], None), False)
    task = QuestionAnsweringTask(TaskSettings.of(model_name_or_path="model"))
    found = [task.featurize(replace(questions), tokenizer, 16)[1] for tokenizer in (left, right)]
    assert len(found[0].cu_seqlens) > 2
    assert rows_of(found[0]) == rows_of(found[1])
