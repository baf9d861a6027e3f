"""Options of the families' models and calls of which the packed encoder has another reading than transformers."""

import copy
import inspect

import pytest
import torch
from family_models import FamilyCase, inputs, no_dropout, pair, plain
from live_models import live

import bertfast
from bertfast.architectures import FAMILIES, IS_TRANSFORMERS_4, family

pytestmark = [
    pytest.mark.usefixtures("small_batches_are_packed"),
    pytest.mark.skipif(IS_TRANSFORMERS_4, reason="bertfast fuses these families of transformers 5"),
]
SLICING = [name for name in ("eurobert", "nomic_bert") if name in FAMILIES]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("number", [2, 0, -1])
@pytest.mark.parametrize("name", SLICING)
def test_fewer_layers_in_the_configuration_are_left_to_transformers(name, number):
    case = FamilyCase(name, "Model")
    patched, hf = pair(case, num_hidden_layers=3)
    values, _ = inputs(case, hf)
    with torch.no_grad():
        whole = patched(**values).last_hidden_state
        for model in (patched, hf):
            model.config.num_hidden_layers = number
        for more in ({}, {"output_hidden_states": True}):
            assert torch.equal(patched(**values, **more).last_hidden_state, hf(**values, **more).last_hidden_state)
        left = bertfast.report(patched).left[f"{type(hf).__name__}.layers.0"]
        assert left == f"it has 3 layers, and the configuration says to run {number}"
        patched.config.num_hidden_layers = 3
        assert torch.equal(patched(**values).last_hidden_state, whole)
    assert not bertfast.report(patched).left


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_whose_loop_slices_its_layers_is_declared(name):
    architecture = family(name)
    source = inspect.getsource(architecture.modeling)
    assert architecture.slices_layers == ("num_hidden_layers]" in source)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("ignored", [-100, 0, -1])
def test_the_label_that_sparse_prediction_ignores(ignored, trained):
    case = FamilyCase("modernbert", "ForMaskedLM", paddings=("right", "none"))
    changes = no_dropout(case) | {"sparse_prediction": True, "sparse_pred_ignore_index": ignored}
    hf = plain(case, **changes).train(trained)
    patched = copy.deepcopy(hf)
    left = bertfast.patch(patched).left
    assert left == (
        {} if ignored == -100 else {"ModernBertForMaskedLM": f"its sparse_pred_ignore_index is {ignored}, not -100"}
    )
    values, _ = inputs(case, hf)
    values["labels"].masked_fill_(values["labels"] == -100, ignored)
    values["labels"][0, 1] = -100  # ignored by the cross entropy
    for more in ({}, {"num_items_in_batch": torch.tensor(7)}):
        patched.zero_grad()
        hf.zero_grad()
        losses = [model(**values, **more).loss for model in (patched, hf)]
        assert_close(*losses)
        for loss in losses:
            loss.backward()
        for own, other in zip(patched.parameters(), hf.parameters(), strict=True):
            if other.grad is not None:
                assert_close(own.grad, other.grad)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("task", ["ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("name", SLICING)
def test_heads_wider_or_narrower_than_the_stream(name, task, head_dim, frozen):
    pooling = {"classifier_pooling": "bos"} if name == "eurobert" else {}
    # NomicBERT's SiLU is also in its masked-LM head, whose operator has GELU.
    case = FamilyCase(name, task, {"head_dim": head_dim, "hidden_act": "gelu"} | pooling, ("right", "left", "none"))
    patched, hf = pair(case, **no_dropout(case))
    values, _ = inputs(case, hf)
    if frozen:
        bertfast.freeze(patched)
    else:
        patched.train()
        hf.train()
    losses = [model(**values).loss for model in (patched, hf)]
    assert_close(*losses)
    if frozen:
        return
    for loss in losses:
        loss.backward()
    for own, other in zip(patched.parameters(), hf.parameters(), strict=True):
        assert_close(own.grad, other.grad)


@pytest.mark.parametrize("task", ["Model", "ForTokenClassification", "ForMaskedLM"])
def test_a_mask_for_each_kind_of_layer_is_left_to_transformers(task):
    case = FamilyCase("modernbert", task, paddings=("none",))
    patched, hf = pair(case, **no_dropout(case))
    values, mask = inputs(case, hf)
    rows, columns = mask.shape
    near = (torch.arange(columns)[:, None] - torch.arange(columns)).abs() <= 2
    whole = torch.ones(rows, 1, columns, columns, dtype=torch.bool)
    values["attention_mask"] = {"full_attention": whole, "sliding_attention": whole & near}
    patched.train()
    hf.train()
    found = patched(**values)[0]
    assert_close(found, hf(**values)[0])
    assert not torch.allclose(found, hf(**values | {"attention_mask": mask})[0], atol=1e-3)


@pytest.mark.parametrize("add", [False, True])
def test_cross_attention_is_named_and_left_to_transformers(add):
    hf = live("BertModel", is_decoder=True, add_cross_attention=add, use_cache=False, attn_implementation="eager")
    patched = copy.deepcopy(hf)
    report = bertfast.patch(patched)
    named = [path for path, why in report.left.items() if "cross-attention is left to transformers" in why]
    layers = len(hf.encoder.layer)
    assert named == [f"BertModel.encoder.layer.{index}.crossattention" for index in range(layers * add)]
    assert set(report.left) == set(named)
    assert {f"BertModel.encoder.layer.{index}" for index in range(layers)} <= set(report.fused)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert_close(patched(ids).last_hidden_state, hf(ids).last_hidden_state)
        if add:
            states = torch.randn(2, 5, hf.config.hidden_size)
            more = {"encoder_hidden_states": states}
            assert torch.equal(patched(ids, **more).last_hidden_state, hf(ids, **more).last_hidden_state)
            assert not torch.allclose(patched(ids, **more).last_hidden_state, hf(ids).last_hidden_state)
