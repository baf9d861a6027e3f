"""`bertfast.BertX`: fused subclasses of transformers' classes, with everything that they inherit."""

import copy
import json
import logging
import pickle
import subprocess
import sys
from inspect import signature

import pytest
import torch
import transformers
from parity import SIZES
from safetensors import safe_open
from torch import nn

import bertfast
from bertfast.architectures import IS_TRANSFORMERS_4
from bertfast.models import bert as fused
from bertfast.models.patch import require_packed

NAMES = [name for name in fused.__all__ if name.startswith("BertFor") or name in ("BertModel", "BertLMHeadModel")]
IDS = torch.arange(3, 15).view(2, 6)


def config(**changes) -> transformers.BertConfig:
    return transformers.BertConfig(**SIZES | changes)


def make(kind: type, **changes) -> nn.Module:
    torch.manual_seed(0)
    return kind(config(**changes)).eval()


def is_whole(model: nn.Module) -> bool:
    report = bertfast.report(model)
    return len(report.fused) > 2 and not report.left


@pytest.mark.parametrize("name", NAMES)
def test_a_fused_class_is_a_subclass_of_the_same_name_that_comes_fused(name):
    kind, original = getattr(bertfast, name), getattr(transformers, name)
    assert issubclass(kind, original)
    assert kind.__name__ == name
    model = make(kind)
    assert type(model) is kind
    assert is_whole(model)
    assert is_whole(type(model)(model.config))


def test_configurations_tokenizers_and_the_base_class_are_transformers_own():
    for name in ("BertConfig", "BertTokenizer", "BertPreTrainedModel"):
        assert getattr(bertfast, name) is getattr(transformers, name)
    assert isinstance(make(bertfast.BertModel), bertfast.BertPreTrainedModel)


def test_a_live_model_becomes_one_of_the_same_class_and_back():
    model = make(transformers.BertForMaskedLM)
    bertfast.patch(model)
    assert type(model) is bertfast.BertForMaskedLM
    assert type(model.bert) is bertfast.BertModel
    bertfast.unpatch(model)
    assert type(model) is transformers.BertForMaskedLM
    assert type(model.bert) is transformers.BertModel


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"])
def test_the_class_of_a_patched_model_constructs_and_loads_models(name, tmp_path):
    model = make(getattr(transformers, name))
    expected = model(IDS)[0]
    bertfast.patch(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [name]
    loaded, info = model.__class__.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for other in (loaded, getattr(transformers, name).from_pretrained(tmp_path)):
        torch.testing.assert_close(other(IDS)[0], expected, rtol=1e-4, atol=1e-5)
    assert is_whole(loaded)


def test_saved_files_hold_each_tied_tensor_once(tmp_path):
    make(bertfast.BertForMaskedLM).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = {*file.keys()}
    assert "bert.embeddings.word_embeddings.weight" in names
    assert not {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"} <= names
    assert "cls.predictions.decoder.weight" not in names


def test_loading_takes_all_arguments_of_transformers(tmp_path):
    make(bertfast.BertModel).save_pretrained(tmp_path)
    dtype = "torch_dtype" if IS_TRANSFORMERS_4 else "dtype"
    model = bertfast.BertModel.from_pretrained(
        tmp_path, add_pooling_layer=False, attn_implementation="eager", **{dtype: torch.bfloat16}
    )
    assert model.dtype == torch.bfloat16
    assert model.pooler is None
    assert model.config._attn_implementation == "eager"
    labelled = bertfast.BertForSequenceClassification.from_pretrained(
        tmp_path, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}
    )
    assert labelled.config.num_labels == 2


class Shifted(bertfast.BertForSequenceClassification):
    """A user's class on a fused one."""

    def __init__(self, config):
        super().__init__(config)
        self.shift = nn.Parameter(torch.ones(()))

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + self.shift
        return outputs


class Doubled(transformers.BertForSequenceClassification):
    """A user's class on transformers' own."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = 2 * outputs.logits
        return outputs


class Named(transformers.BertForMaskedLM):
    """A user's class that changes nothing."""


def test_a_users_class_on_a_fused_one_is_fused_and_keeps_what_it_does():
    model = make(Shifted)
    plain = make(transformers.BertForSequenceClassification)
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits + 1, rtol=1e-4, atol=1e-5)
    assert is_whole(model)
    with pytest.raises(ValueError, match="Shifted derives from BertForSequenceClassification"):
        bertfast.unpatch(model)


def with_own_encoder(library, name):
    """Return a model with an encoder of a user's class, which returns other outputs than its base."""

    class Encoder(library.BertModel):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.last_hidden_state = outputs.last_hidden_state * 3
            if self.pooler is not None:
                outputs.pooler_output = outputs.last_hidden_state[:, 1]
            return outputs

    class Model(getattr(library, name)):
        def __init__(self, config):
            super().__init__(config)
            self.bert = Encoder(config, add_pooling_layer=self.bert.pooler is not None)
            self.post_init()

    torch.manual_seed(0)
    return Model(transformers.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()


@pytest.mark.parametrize(
    ("name", "labels"), [("BertForSequenceClassification", torch.tensor([0, 1])), ("BertForMaskedLM", IDS)]
)
def test_an_encoder_of_a_users_class_on_a_fused_one_is_called_by_its_head(name, labels):
    model, plain = with_own_encoder(bertfast, name), with_own_encoder(transformers, name)
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(IDS, labels=labels).loss, plain(IDS, labels=labels).loss)
    assert bertfast.report(model).left["bert"] == "Encoder has a forward of its own, which its heads call"
    with pytest.raises(ValueError, match="cannot run on packed batches"):
        require_packed(model)


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_a_constructor_has_the_signature_of_transformers(name):
    assert signature(getattr(bertfast, name).__init__) == signature(getattr(transformers, name).__init__)


@pytest.mark.parametrize("kind", [Doubled, Named])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_users_class_on_transformers_own_is_patched_copied_and_pickled(kind, copied):
    model = make(kind)
    expected = model(IDS).logits
    bertfast.patch(model)
    assert isinstance(model, kind)
    for one in (model, copied(model)):
        torch.testing.assert_close(one(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        assert bertfast.report(one).fused
    bertfast.unpatch(model)
    assert type(model) is kind


@pytest.mark.slow
def test_importing_changes_nothing_in_transformers():
    code = """
import json, sys, transformers
from transformers.models.bert import modeling_bert as bert
from transformers.models.auto import modeling_auto as auto

def state():
    kinds = {n: k for n, k in vars(bert).items() if isinstance(k, type)}
    mappings = {n: [*map(str, m.items())] for n, m in vars(auto).items() if n.endswith("_MAPPING_NAMES")}
    attention = {n: id(f) for n, f in transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.items()}
    return {n: [id(k), *((a, id(v)) for a, v in vars(k).items())] for n, k in kinds.items()}, mappings, attention

before = state()
import bertfast
bertfast.BertForMaskedLM, bertfast.AutoModel, bertfast.patch
assert transformers.BertForMaskedLM is bert.BertForMaskedLM
print(before == state())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import bertfast",
        "import bertfast.ops, bertfast.encoder",
        "import bertfast.cli.main; bertfast.cli.main.main(['--help'])",
        "import bertfast.cli.main; bertfast.cli.main.main(['doctor', '--device', 'cpu'])",
    ],
)
def test_commands_without_models_do_not_import_transformers(code):
    code += "; import sys; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


def test_an_auto_class_gives_the_fused_class(tmp_path):
    make(transformers.BertForSequenceClassification).save_pretrained(tmp_path)
    model = bertfast.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(model) is bertfast.BertForSequenceClassification
    _, info = bertfast.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert "missing_keys" in info
    assert type(bertfast.AutoModelForMaskedLM.from_config(config())) is bertfast.BertForMaskedLM


def test_an_auto_class_warns_once_of_an_unsupported_family_and_does_not_change_it(caplog):
    other = transformers.MPNetConfig(**{name: x for name, x in SIZES.items() if name != "type_vocab_size"})
    with caplog.at_level(logging.WARNING, "bertfast"):
        model = bertfast.AutoModel.from_config(other)
    assert type(model) is transformers.MPNetModel
    reason = "its attention scores depend on relative positions"
    assert [record.getMessage() for record in caplog.records if record.name == "bertfast"] == [
        f"bertfast does not fuse MPNetModel, which runs transformers' own code, unchanged: {reason}"
    ]
    assert bertfast.report(model).left == {"MPNetModel": reason}
    with pytest.raises(ValueError, match=f"nothing to fuse in this MPNetModel: {reason}"):
        bertfast.patch(model)
    with pytest.raises(OSError, match=r"AutoModel\.from_pretrained"):
        bertfast.AutoModel()


def test_a_preset_has_the_published_sizes():
    base = bertfast.preset_config("base", vocab_size=99)
    assert (base.num_hidden_layers, base.hidden_size, base.num_attention_heads) == (12, 768, 12)
    assert (base.intermediate_size, base.vocab_size) == (3072, 99)
    assert bertfast.preset_config("small", num_hidden_layers=2).num_hidden_layers == 2
    with pytest.raises(ValueError, match="no preset 'huge': use one of tiny, mini, small, medium, base, large"):
        bertfast.preset_config("huge")


def test_patching_twice_gives_the_report():
    model = make(transformers.BertForMaskedLM)
    first = bertfast.patch(model)
    assert bertfast.patch(model) == first == bertfast.report(model)


class Pair(nn.Module):
    """A tree with two encoders."""

    def __init__(self):
        super().__init__()
        self.one, self.two = make(transformers.BertModel), make(transformers.BertModel)


def test_a_tree_of_which_one_encoder_is_patched_is_completed():
    pair = Pair()
    bertfast.patch(pair.one)
    assert bertfast.report(pair).left == {"two": "it is not patched: call bertfast.patch to fuse it"}
    assert not bertfast.patch(pair).left
    torch.testing.assert_close(pair.one(IDS).last_hidden_state, pair.two(IDS).last_hidden_state)


def test_a_report_of_a_model_of_another_family_is_empty():
    report = bertfast.report(nn.Linear(2, 2))
    assert (report.fused, report.left) == ({}, {})


def test_inherited_methods_work():
    model = make(bertfast.BertForMaskedLM)
    assert model.num_parameters() > 0
    assert model.base_model is model.bert
    model.resize_token_embeddings(60)
    assert model(IDS).logits.shape[-1] == 60
    model.set_input_embeddings(nn.Embedding(60, SIZES["hidden_size"]))
    model.enable_input_require_grads()
    causal = make(bertfast.BertLMHeadModel, is_decoder=True)
    assert causal.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 9)


@pytest.mark.parametrize("whole", [True, False])
def test_a_program_is_told_why_a_model_cannot_take_packed_batches(whole):
    model = make(bertfast.BertForMaskedLM)
    if whole:
        require_packed(model)
    else:
        model.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.Mish()
        with pytest.raises(ValueError, match=r"cannot run on packed batches:(?s:.*)layer.1: its activation is Mish"):
            require_packed(model)


def test_a_model_without_values_is_patched_and_reported():
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(config())
    report = bertfast.patch(model)
    assert "no fast kernels for float32 on meta" in report.left["bert"]
