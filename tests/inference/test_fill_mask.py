"""Masked-token prediction by the model's probabilities."""

import pytest
import torch

from bertfast import BertConfig, BertForMaskedLM, BertForSequenceClassification
from bertfast.data.tokenizer import save_tokenizer, train_tokenizer
from bertfast.inference.fill_mask import FillMaskSettings, fill_mask, fill_mask_command

TOKENIZER = train_tokenizer(["the cat sat on the mat"], 128)


@pytest.fixture
def config() -> BertConfig:
    # vocab_size is rounded up beyond the tokenizer's vocabulary.
    return BertConfig(
        vocab_size=140,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
    )


@pytest.fixture
def model(config) -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(config).eval()


def test_each_mask_gets_its_most_probable_tokens(model):
    predictions = fill_mask(model, TOKENIZER, "the [MASK] sat on the [MASK]", top_k=128)
    assert len(predictions) == 2
    ids = torch.tensor([TOKENIZER.encode("the [MASK] sat on the [MASK]").ids])
    positions = (ids[0] == TOKENIZER.token_to_id("[MASK]")).nonzero().squeeze(1)
    with torch.no_grad():
        probabilities = model(ids).logits[0, positions, :128].softmax(1)
    for tokens, expected in zip(predictions, probabilities, strict=True):
        assert [p for _, p in tokens] == sorted((p for _, p in tokens), reverse=True)
        assert sum(p for _, p in tokens) == pytest.approx(1, abs=1e-5)
        assert {t: pytest.approx(float(expected[TOKENIZER.token_to_id(t)])) for t, _ in tokens} == dict(tokens)


def test_most_probable_token_comes_first_and_unused_ids_are_not_predicted(model):
    with torch.no_grad():
        model.cls.predictions.bias[TOKENIZER.token_to_id("cat")] = 20
        model.cls.predictions.bias[135] = 30  # beyond the tokenizer's vocabulary
    [[(token, probability)]] = fill_mask(model, TOKENIZER, "the [MASK] sat", top_k=1)
    assert (token, round(probability, 3)) == ("cat", 1.0)


def test_command_prints_the_predictions(model, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    save_tokenizer(TOKENIZER, tmp_path)
    fill_mask_command(FillMaskSettings(str(tmp_path), "the [MASK] sat", top_k=3))
    printed = capsys.readouterr().out
    for token, _ in fill_mask(model, TOKENIZER, "the [MASK] sat", top_k=3)[0]:
        assert f"  {token}\n" in printed
    assert len(printed.splitlines()) == 2 + 3


def test_invalid_input_raises(model, config, tmp_path):
    with pytest.raises(ValueError, match=r"no \[MASK\] in 'the cat'"):
        fill_mask(model, TOKENIZER, "the cat")
    with pytest.raises(ValueError, match="22 tokens, more than the model's 12 positions"):
        fill_mask(model, TOKENIZER, "[MASK] " * 20)
    with pytest.raises(ValueError, match="--top-k must be at most 128, the size of the vocabulary, got 129"):
        fill_mask(model, TOKENIZER, "the [MASK] sat", top_k=129)
    with pytest.raises(ValueError, match="--top-k must be at least 1, got 0"):
        FillMaskSettings("x", "[MASK]", top_k=0)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    save_tokenizer(TOKENIZER, tmp_path)
    with pytest.raises(ValueError, match="was not trained as a BertForMaskedLM"):
        fill_mask_command(FillMaskSettings(str(tmp_path), "[MASK]"))


def test_lines_of_standard_input_are_texts(model, tmp_path, capsys, pipe):
    model.save_pretrained(tmp_path)
    save_tokenizer(TOKENIZER, tmp_path)
    pipe("the [MASK] sat\r\non [MASK]\r\nthe cat\r\n")
    with pytest.raises(ValueError, match=r"standard input, line 3: no \[MASK\] in 'the cat'"):
        fill_mask_command(FillMaskSettings(str(tmp_path), "-", top_k=1))
    assert [line for line in capsys.readouterr().out.splitlines() if not line.startswith("  ")] == [
        "the [MASK] sat",
        "[MASK] 1",
        "on [MASK]",
        "[MASK] 1",
    ]


def test_text_that_is_not_utf8_is_refused(model):
    with pytest.raises(ValueError, match=r"the text is not UTF-8 \(character 12\)"):
        fill_mask(model, TOKENIZER, "the [MASK] \udce9")
