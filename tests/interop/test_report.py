"""`bertfast.report` says fused only of what calls run fused, and `patch` leaves what it cannot fuse."""

import logging

import pytest
import torch
import transformers
from live_models import VALUES, live
from parity import SIZES
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoConfig

import bertfast
from bertfast.models import fused

pytestmark = pytest.mark.usefixtures("small_batches_are_packed")


def global_hook(model):
    return register_module_forward_hook(lambda *_: None)


def ask_for_attentions(model):
    model.config.output_attentions = True


def fill_cache(model):
    model.config.is_decoder = True


def double(model):
    model.double()


def half(model):
    model.half()


@pytest.mark.parametrize("change", [global_hook, ask_for_attentions, fill_cache, double, half])
def test_a_model_that_runs_transformers_own_code_is_not_reported_as_fused(change, monkeypatch):
    model = live("BertForMaskedLM", attn_implementation="eager").train()
    bertfast.patch(model)
    calls, layer = [], fused.functions.layer
    monkeypatch.setattr(fused.functions, "layer", lambda *args: calls.append(1) or layer(*args))
    handle = change(model)
    try:
        report = bertfast.report(model)
        values = {name: x for name, x in VALUES.items() if name != "labels"}
        model(**values)
    finally:
        if handle is not None:
            handle.remove()
    assert not calls
    without_attention = set() if change in (global_hook, double, half) else {"cls.predictions.transform"}
    assert set(report.fused) == without_attention
    assert {"bert", "BertForMaskedLM"} <= set(report.left)


def test_hooks_for_all_modules_see_those_of_the_masked_lm_head():
    model, plain = live("BertForMaskedLM"), live("BertForMaskedLM")
    bertfast.patch(model)
    seen = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        for one in (model, plain):
            one(VALUES["input_ids"])
            seen.append(None)
    finally:
        handle.remove()
    middle = seen.index(None)
    assert seen[:middle] == seen[middle + 1 : -1]


@pytest.mark.parametrize("name", ["return_logits", "output_hidden_states"])
def test_a_loss_with_logits_is_reported(name):
    model = live("BertForMaskedLM").train()
    bertfast.patch(model)
    setattr(model.config, name, True)
    assert model(VALUES["input_ids"], labels=VALUES["input_ids"]).logits is not None
    assert bertfast.report(model).left == {"BertForMaskedLM": "the configuration asks for logits or hidden states"}


def test_recomputed_layers_next_to_one_with_a_hook_are_not_reported_as_fused(monkeypatch):
    model = live("BertModel").train()
    bertfast.patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert not bertfast.report(model).left
    calls, layer = [], fused.functions.layer
    monkeypatch.setattr(fused.functions, "layer", lambda *args: calls.append(1) or layer(*args))
    model.encoder.layer[0].register_forward_hook(lambda *_: None)
    model(VALUES["input_ids"], VALUES["attention_mask"])
    assert not calls
    report = bertfast.report(model)
    assert not report.fused
    assert "its activations are recomputed" in report.left["BertModel.encoder.layer.1"]


class OwnConfig(transformers.BertConfig):
    model_type = "own_bert_of_a_user"


class OwnEncoder(transformers.BertModel):
    """With a forward of its own."""

    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class OwnHelper(transformers.BertModel):
    """With another function that its forward calls."""

    def get_extended_attention_mask(self, *args, **kwargs):
        return super().get_extended_attention_mask(*args, **kwargs)

    def _create_attention_masks(self, *args, **kwargs):
        return super()._create_attention_masks(*args, **kwargs)


class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.own = live("BertModel"), OwnEncoder(OwnConfig(**SIZES)).eval()


def test_an_encoder_with_a_forward_of_its_own_is_left_and_others_are_fused():
    tree = Tree()
    kinds = [type(module) for module in tree.own.modules()]
    report = bertfast.patch(tree)
    assert report.left == {"own": "OwnEncoder has a forward of its own, which a fused encoder would not call"}
    assert "plain.encoder.layer.1" in report.fused
    assert [type(module) for module in tree.own.modules()] == kinds
    assert bertfast.report(tree) == report
    bertfast.unpatch(tree)


def test_an_auto_class_warns_once_of_an_encoder_with_a_forward_of_its_own(caplog):
    AutoConfig.register(OwnConfig.model_type, OwnConfig, exist_ok=True)
    transformers.AutoModel.register(OwnConfig, OwnEncoder, exist_ok=True)
    with caplog.at_level(logging.WARNING, "bertfast"):
        model = bertfast.AutoModel.from_config(OwnConfig(**SIZES))
    assert type(model) is OwnEncoder
    assert [record.getMessage() for record in caplog.records if record.name == "bertfast"] == [
        "bertfast does not fuse OwnEncoder, which runs transformers' own code, unchanged: "
        "OwnEncoder has a forward of its own, which a fused encoder would not call"
    ]


@pytest.mark.skipif(not hasattr(transformers.BertModel, "_create_attention_masks"), reason="of transformers 5")
def test_the_message_names_the_method_that_a_user_wrote():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="OwnHelper has a _create_attention_masks of its own"):
        bertfast.patch(OwnHelper(transformers.BertConfig(**SIZES)))
