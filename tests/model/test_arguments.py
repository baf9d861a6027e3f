"""Initialisation, and the messages for unsupported input."""

import math

import pytest
import torch
from parity import CASES, SIZES, inputs, models
from torch import nn

import bertfast
from bertfast import encoder
from bertfast.architectures.initialise import initialise
from bertfast.encoder.unpadding import unpad

BY_NAME = {case.name: case for case in CASES}
IDS = torch.ones(2, 5, dtype=torch.int64)


@pytest.fixture(scope="module")
def model():
    return models(BY_NAME["model"])[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_initial_weights_are_truncated_normal_and_biases_zero(case):
    torch.manual_seed(0)
    sizes = SIZES | case.changes | {"hidden_size": 64, "initializer_range": 0.05}
    model = getattr(bertfast, case.class_name)(bertfast.BertConfig(**sizes), **case.arguments)
    initialise(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
        if isinstance(module, nn.Linear):
            assert module.bias is None or (module.bias == 0).all(), name
        if isinstance(module, nn.Linear | nn.Embedding):
            assert module.weight.abs().max() <= 0.1, name
    assert (model.get_input_embeddings().weight[0] == 0).all()
    # The standard deviation of a normal distribution truncated at two standard deviations.
    cut = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
    wide = [p for name, p in model.named_parameters() if name.endswith("intermediate.dense.weight")]
    assert abs(torch.stack(wide).std() / (0.05 * cut) - 1) < 0.03


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "give either input_ids or inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 5, 64)}, "and not both"),
        ({"input_ids": IDS[0]}, r"input_ids must have shape \[batch, length\], none of them 0, got \[5\]"),
        ({"input_ids": IDS[:, :0]}, r"none of them 0, got \[2, 0\]"),
        (
            {"inputs_embeds": torch.zeros(2, 5)},
            r"inputs_embeds must have shape \[batch, length, hidden\].* got \[2, 5\]",
        ),
        ({"input_ids": IDS, "attention_mask": IDS[:, :4]}, r"attention_mask must have shape \[2, 5\].* got \[2, 4\]"),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 5, 5)},
            "masks between pairs of tokens are not supported",
        ),
        (
            {"input_ids": IDS, "token_type_ids": IDS[:, :3]},
            r"token_type_ids \[2, 3\] does not broadcast to \[2, 5\]",
        ),
        ({"input_ids": IDS, "position_ids": IDS[:, :3]}, r"position_ids \[2, 3\] does not broadcast to \[2, 5\]"),
        ({"input_ids": torch.ones(1, 17).long()}, "17 tokens in a row are more than the 16 positions"),
        ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 5])}, r"must have shape \[1, tokens\], got \[2, 5\]"),
        (
            {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 6])},
            "more tokens than the 5 slots",
        ),
        ({"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([1, 5])}, "must start at 0, got 1"),
        (
            {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 5]), "attention_mask": torch.zeros(1, 5)},
            "takes no attention_mask: leave the padding out instead",
        ),
    ],
)
def test_input_of_wrong_shape_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        unpad(**{"input_ids": None} | arguments, positions=16)


def test_packed_positions_stay_within_their_sequences(model):
    """More tokens than positions are allowed, and so are padding slots after the last sequence."""
    ids = torch.ones(1, 40, dtype=torch.int64)
    outputs = model(ids, cu_seq_lens_q=torch.tensor([0, 12, 14]))
    assert outputs.last_hidden_state.shape == (1, 40, 64)
    assert outputs.last_hidden_state.isfinite().all()


def test_a_projection_that_is_not_plain_is_called():
    """A linear layer with a hook, of another class or with another `forward` is called."""
    case = BY_NAME["masked_lm"]
    model, _ = models(case)
    packed, _ = unpad(inputs(case, "right")["input_ids"], positions=16)
    rows = torch.arange(5)
    plain = encoder.masked_lm_logits(model, packed, rows)
    linear = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    called = set()
    for name, module in linear:
        assert encoder.is_plain(module)
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        assert not encoder.is_plain(module)
    torch.testing.assert_close(encoder.masked_lm_logits(model, packed, rows), plain)
    assert called == {name for name, _ in linear}


def test_activation_checkpointing_replays_the_masks():
    model, _ = models(BY_NAME["model"], hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    model.train()
    values = inputs(BY_NAME["model"], "right")
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        if checkpointed:
            output = torch.utils.checkpoint.checkpoint(
                lambda values: model(**values).last_hidden_state, values, use_reentrant=False
            )
        else:
            output = model(**values).last_hidden_state
        output.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, replayed in zip(*gradients, strict=True):
        assert torch.equal(plain, replayed)
