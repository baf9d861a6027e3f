"""Hidden states, attention weights and generated tokens of frozen and int8 models, also saved and opened ones."""

import copy

import family_models
import pytest
import torch
from helpers import assert_as_accurate_as_torch
from live_models import batch, live
from parity import double

import bertfast

CASES = [case for case in family_models.CASES if case.task == "Model"]


def called(model, values, **options):
    values = {name: x for name, x in values.items() if name != "labels"}
    with torch.no_grad():
        return model(**values, **options)


def of_tokens(outputs, mask) -> list[torch.Tensor]:
    """Return the hidden states of tokens, [T, H] each, and their attention weights to tokens, [T, heads, columns]."""
    weights = outputs.attentions or ()
    per_query = [x.transpose(1, 2)[mask] for x in weights]
    return [x[mask] for x in outputs.hidden_states] + per_query


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hidden_states_of_a_frozen_model(case, precision):
    hf = family_models.plain(case)
    model = copy.deepcopy(hf)
    bertfast.freeze(model, precision)
    values, mask = family_models.inputs(case, hf)
    options = {"output_hidden_states": True}
    truth = of_tokens(called(double(hf), values, **options), mask)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = of_tokens(called(hf, values, **options), mask)
    actual = of_tokens(called(model, values, **options), mask)
    assert len(actual) == len(expected) == 3
    for number, triple in enumerate(zip(actual, expected, truth, strict=True)):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        assert_as_accurate_as_torch(*triple, name=f"hidden state {number}", dtype=dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_attention_weights(case, precision):
    hf = family_models.plain(case, attn_implementation="eager")
    model = copy.deepcopy(hf)
    values, mask = family_models.inputs(case, hf)
    if precision == "int8":
        bertfast.quantize(model, [{name: x for name, x in values.items() if name != "labels"}])
    else:
        bertfast.freeze(model, precision)
    expected, actual = (of_tokens(called(each, values, output_attentions=True, output_hidden_states=True), mask)
                        for each in (hf, model))  # fmt: skip
    assert len(actual) == len(expected) == 5
    for x, y in zip(actual, expected, strict=True):
        if precision == "fp32":
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        else:
            assert torch.cosine_similarity(x.float().flatten(1), y.flatten(1)).mean() >= 0.999


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_saved_model_has_the_same_hidden_states_bitwise(case, precision, tmp_path):
    model = family_models.plain(case)
    values, mask = family_models.inputs(case, model)
    if precision == "int8":
        bertfast.quantize(model)
    else:
        bertfast.freeze(model, precision)
    model.save_pretrained(tmp_path)
    opened = bertfast.AutoModel.from_pretrained(tmp_path)
    bertfast.freeze(opened, None if precision == "int8" else precision)
    expected, actual = (of_tokens(called(each, values, output_hidden_states=True), mask) for each in (model, opened))
    assert len(expected) == 3
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@torch.no_grad()
def test_a_decoder_generates_and_attends_to_an_encoder(precision):
    hf = live("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    model = copy.deepcopy(hf)
    if precision == "int8":
        bertfast.quantize(model)
    else:
        bertfast.freeze(model, precision)
    ids = batch("none")["input_ids"][:, :4]
    states = torch.randn(len(ids), 3, hf.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for use_cache in (False, True):
        options = {"encoder_hidden_states": states, "use_cache": use_cache}
        expected, actual = hf(ids, **options), model(ids, **options)
        if precision == "fp32":
            torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert torch.cosine_similarity(actual.logits.float(), expected.logits, dim=-1).min() >= 0.999
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(ids, **options)
    assert generated.shape == (len(ids), 9)
    if precision == "fp32":
        assert torch.equal(generated, hf.generate(ids, **options))
