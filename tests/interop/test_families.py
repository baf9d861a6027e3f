"""Models of other families than BERT: patched, packed, copied, changed by users, and what is left to transformers."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from family_models import CASES, COLUMNS, FamilyCase, inputs, no_dropout, pair, plain, table
from torch import nn

import bertfast
from bertfast import encoder
from bertfast.architectures import FAMILIES, IS_TRANSFORMERS_4, family
from bertfast.encoder import kernel_support
from bertfast.models.fused import FusedEncoder
from bertfast.models.patch import require_packed

BY_NAME = {str(case): case for case in CASES}
FIRST_TOKEN = [
    BY_NAME[name]
    for name in (
        "roberta-ForSequenceClassification",
        "electra-ForSequenceClassification",
        "electra-ForMultipleChoice",
        "distilbert-ForSequenceClassification",
        "distilbert-ForMultipleChoice",
    )
]


def without_labels(values):
    return {name: x for name, x in values.items() if name not in ("labels", "start_positions", "end_positions")}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def outputs(model, values):
    with torch.no_grad():
        return model(**values)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fused_model_is_copied_pickled_saved_and_unpatched(case, tmp_path):
    patched, hf = pair(case)
    values, _ = inputs(case, hf)
    expected = outputs(patched, values)[0]
    for again in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert type(again) is type(patched)
        assert torch.equal(outputs(again, values)[0], expected)
    patched.save_pretrained(tmp_path)
    opened = type(patched).from_pretrained(tmp_path)
    assert type(opened) is type(patched)
    assert_close(outputs(opened.eval(), values)[0], expected)
    assert type(patched)(patched.config).config.model_type == case.family
    assert isinstance(patched, type(hf))
    bertfast.unpatch(patched)
    assert [type(module) for module in patched.modules()] == [type(module) for module in hf.modules()]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_model_of_a_family_has_a_fused_class(name):
    architecture = family(name)
    models = {
        kind.__name__
        for kind in vars(architecture.modeling).values()
        if isinstance(kind, type)
        and issubclass(kind, transformers.PreTrainedModel)
        and kind.__module__ == architecture.module
        and not kind.__name__.endswith("PreTrainedModel")
    }
    declared = {name for names in architecture.classes.values() for name in names}
    assert models <= declared
    assert all(hasattr(architecture.modeling, name) for name in declared)


def test_an_auto_class_fuses_a_model(tmp_path):
    plain(BY_NAME["roberta-ForSequenceClassification"]).save_pretrained(tmp_path)
    model = bertfast.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(model).__module__ == "bertfast.models.families"
    assert not bertfast.report(model).left


def packed(values, mask):
    """Return the input without padding, all sequences in one row."""
    result = {name: x[mask][None] for name, x in values.items() if x.shape == mask.shape and name != "attention_mask"}
    ends = mask.sum(1).cumsum(0)
    return result | {"cu_seq_lens_q": torch.cat([torch.zeros(1), ends]).int(), "max_length_q": COLUMNS}


@pytest.mark.parametrize("hidden_states", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if case.task not in ("ForMultipleChoice",)], ids=str)
def test_packed_is_padded(case, hidden_states):
    pooling = {"classifier_pooling": "bos"} if case.family == "eurobert" else {}
    case = replace(case, changes=case.changes | pooling, paddings=("right", "none"), pads_by_id=True)
    patched, hf = pair(case)
    values, mask = inputs(case, hf)
    values = without_labels(values)
    padded = patched(**values, output_hidden_states=hidden_states)
    together = patched(**packed(values, mask), output_hidden_states=hidden_states)
    for name, x in padded.items():
        if isinstance(x, torch.Tensor):
            assert_close(together[name].squeeze(0), x[mask] if x.shape[:2] == mask.shape else x)


@pytest.mark.parametrize("padding", ["left", "inside"])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("case", FIRST_TOKEN, ids=str)
def test_the_first_token_is_read_at_padding(case, padding, hooked):
    case = FamilyCase(case.family, case.task, paddings=(padding, "right"))
    patched, hf = pair(case)
    values, _ = inputs(case, hf)
    if hooked:
        for model in (patched, hf):
            reader = getattr(model, "sequence_summary", model.classifier)
            reader.register_forward_hook(lambda module, arguments, output: output * 2)
    assert_close(outputs(patched, values).logits, outputs(hf, values).logits)


@pytest.mark.parametrize("case", FIRST_TOKEN, ids=str)
def test_the_last_layer_of_a_head_that_reads_the_first_token_runs_on_that_alone(case, monkeypatch):
    patched, hf = pair(case)
    rows = []
    run = FusedEncoder.run_packed
    monkeypatch.setattr(FusedEncoder, "run_packed", lambda *a: rows.append(run(*a)) or rows[-1])
    values, _ = inputs(case, hf)
    outputs(patched, values)
    assert len(rows[0]) == values["attention_mask"].flatten(0, -2).shape[0]


class MeanHead(nn.Module):
    """A user's classifier, which reads all tokens."""

    def __init__(self, hidden, labels):
        super().__init__()
        self.out = nn.Linear(hidden, labels)

    def forward(self, features, **kwargs):
        return self.out(features).mean(1)


def test_a_classifier_of_a_user_gets_all_tokens_and_refuses_packed_input():
    case = FamilyCase("roberta", "ForSequenceClassification", paddings=("none",))
    patched, hf = pair(case)
    patched.classifier = hf.classifier = MeanHead(64, 3)
    values, mask = inputs(case, hf)
    assert_close(outputs(patched, values).logits, outputs(hf, values).logits)
    with pytest.raises(ValueError, match="reads the first token, was replaced: pass it padded"):
        patched(**packed(values, mask))


class Shifted(transformers.RobertaForSequenceClassification):
    """A user's class."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + 1
        return outputs


def test_a_users_class_keeps_what_it_does_and_refuses_packed_input():
    case = FamilyCase("roberta", "ForSequenceClassification", paddings=("left",))
    hf = plain(case)
    hf.__class__ = Shifted
    patched = copy.deepcopy(hf)
    bertfast.patch(patched)
    values, mask = inputs(case, hf)
    assert isinstance(patched, Shifted)
    assert_close(outputs(patched, values).logits, outputs(hf, values).logits)
    with pytest.raises(ValueError, match="because its forward, or that of the module that reads the first token"):
        patched(**packed(values, mask))


@pytest.mark.parametrize("summary", ["last", "mean"])
def test_a_summary_of_other_tokens_is_left_to_transformers(summary):
    case = FamilyCase("electra", "ForMultipleChoice", {"summary_type": summary})
    hf = plain(case)
    patched = copy.deepcopy(hf)
    report = bertfast.patch(patched)
    assert "it reads other tokens than the first" in report.left["ElectraForMultipleChoice"]
    values, _ = inputs(case, hf)
    assert torch.equal(outputs(patched, values).logits, outputs(hf, values).logits)
    with pytest.raises(ValueError, match="cannot run on packed batches"):
        require_packed(patched)


def test_positions_of_roberta_are_limited_by_tokens_and_not_by_columns():
    case = FamilyCase("roberta", "Model", {"max_position_embeddings": 14})
    patched, hf = pair(case)
    ids = torch.full((2, 20), 7)
    ids[:, 12:] = 1
    values = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    if not IS_TRANSFORMERS_4:  # whose buffer of token types is too short
        assert_close(outputs(patched, values).pooler_output, outputs(hf, values).pooler_output)
    for name, x in {"input_ids": torch.full((2, 13), 7), "inputs_embeds": torch.randn(2, 13, 64)}.items():
        with pytest.raises(ValueError, match="13 tokens in a row are more than the 12 positions that the model knows"):
            patched(**{name: x})


@pytest.mark.parametrize("name", ["roberta-Model", "electra-Model", "distilbert-Model"])
def test_an_activation_without_operator_is_named(name):
    hf = plain(BY_NAME[name], hidden_act="mish")
    report = bertfast.patch(hf)
    layers = [reason for path, reason in report.left.items() if "layer.0" in path]
    assert len(layers) == 1
    assert "activation" in layers[0]
    assert "Mish" in layers[0]


def test_relative_positions_are_named():
    if not IS_TRANSFORMERS_4:
        pytest.skip("transformers 5 has none")
    hf = plain(FamilyCase("roberta", "Model", {"position_embedding_type": "relative_key"}))
    assert "its positions are relative_key" in str(bertfast.patch(hf))


def test_a_replaced_count_of_positions_is_noticed(monkeypatch):
    patched, _ = pair(BY_NAME["roberta-Model"])
    kind = type(patched.embeddings).original
    name = "create_position_ids_from_inputs_embeds"
    monkeypatch.setattr(kind, name, staticmethod(lambda *arguments: None))
    assert "not transformers' own" in bertfast.report(patched).left["RobertaModel.embeddings"]


def test_another_loss_of_distilbert_is_used():
    case = BY_NAME["distilbert-ForMaskedLM"]
    patched, hf = pair(case, **no_dropout(case))
    values, _ = inputs(case, hf)
    for model in (patched, hf):
        model.mlm_loss_fct = nn.CrossEntropyLoss(label_smoothing=0.3)
        model.train()
    assert_close(patched(**values).loss, hf(**values).loss)


def modernbert(task, **changes):
    if IS_TRANSFORMERS_4:
        pytest.skip("bertfast fuses ModernBERT of transformers 5")
    return FamilyCase("modernbert", task, changes)


@pytest.mark.parametrize(("padding", "task"), [("inside", "Model"), ("left", "ForSequenceClassification")])
def test_windows_that_count_padding_are_left_to_transformers(padding, task):
    case = replace(modernbert(task), paddings=(padding, "none"))
    patched, hf = pair(case)
    values, _ = inputs(case, hf)
    assert torch.equal(outputs(patched, values)[0], outputs(hf, values)[0])
    windows = {name: x[:, :5] for name, x in without_labels(values).items()}
    assert not torch.equal(outputs(patched, windows)[0], outputs(hf, windows)[0])  # no longer than a window: packed


@pytest.mark.parametrize("pooling", ["mean", "late"])
def test_packed_input_of_a_head_that_reads_the_mean_is_refused(pooling):
    name = "modernbert" if pooling == "mean" else "eurobert"
    if name not in FAMILIES:
        pytest.skip("this version of transformers has no such family")
    case = FamilyCase(name, "ForSequenceClassification", {"classifier_pooling": pooling}, ("none",))
    patched, hf = pair(case)
    values, mask = inputs(case, hf)
    with pytest.raises(ValueError, match="reads the mean of a row's tokens: pass it padded"):
        patched(**packed(without_labels(values), mask))
    require_packed(patched)
    hidden = encoder.pack(patched, **packed(without_labels(values), mask))
    assert_close(encoder.sequence_logits(patched, hidden), outputs(hf, values).logits)


def test_scaled_rotary_positions_are_named():
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    rope = {"full_attention": linear, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    case = modernbert("Model", rope_parameters=rope)
    hf = plain(case)
    patched = copy.deepcopy(hf)
    assert "its rotary positions are scaled (linear)" in bertfast.patch(patched).left["ModernBertModel.embeddings"]
    values, _ = inputs(case, hf)
    assert torch.equal(outputs(patched, values)[0], outputs(hf, values)[0])


def test_a_hook_on_rotary_positions_is_called():
    case = modernbert("Model")
    patched, hf = pair(case)
    values, _ = inputs(case, hf)
    for model in (patched, hf):
        model.rotary_emb.register_forward_hook(lambda module, arguments, tables: tuple(2 * x for x in tables))
    assert "its rotary_emb was replaced or has a hook" in str(bertfast.report(patched))
    assert torch.equal(outputs(patched, values)[0], outputs(hf, values)[0])


def test_another_loss_function_is_used():
    case = modernbert("ForMaskedLM")
    patched, hf = pair(case, **no_dropout(case))
    values, _ = inputs(case, hf)
    for model in (patched.train(), hf.train()):
        model.loss_function = lambda logits, labels, **keywords: logits.square().mean()
    torch.testing.assert_close(patched(**values).loss, hf(**values).loss)


def test_token_types_of_a_family_without_them_are_left_to_transformers():
    if IS_TRANSFORMERS_4:
        pytest.skip("transformers 4 refuses them")
    patched, hf = pair(BY_NAME["distilbert-Model"])
    values, _ = inputs(BY_NAME["distilbert-Model"], hf)
    values["token_type_ids"] = torch.ones_like(values["input_ids"])
    assert torch.equal(outputs(patched, values).last_hidden_state, outputs(hf, values).last_hidden_state)


@pytest.mark.skipif("eurobert" not in FAMILIES, reason="the table has the families of later versions of transformers")
def test_the_table_of_classes_in_the_docs_is_current():
    document = (Path(__file__).parents[2] / "docs" / "COMPATIBILITY.md").read_text()
    assert table() in document, f"put this table into docs/COMPATIBILITY.md:\n{table()}"


@pytest.mark.parametrize("name", [name for name in BY_NAME if name.endswith("ForMaskedLM")])
def test_the_training_loss_of_a_model_in_bf16_is_fp32(name):
    patched, hf = pair(BY_NAME[name])
    values, _ = inputs(BY_NAME[name], hf)
    losses = [model.bfloat16().train()(**values).loss for model in (patched, hf)]
    if kernel_support.unsupported_reason(torch.device("cpu"), torch.bfloat16) is not None:
        pytest.skip("the CPU has no kernels in bf16")
    in_transformers = torch.float32 if name.startswith(("modernbert", "eurobert")) else torch.bfloat16
    assert [loss.dtype for loss in losses] == [torch.float32, in_transformers]
    document = (Path(__file__).parents[2] / "docs" / "COMPATIBILITY.md").read_text()
    assert "the masked-LM loss in training mode is fp32; that of transformers is bf16" in " ".join(document.split())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.skipif(IS_TRANSFORMERS_4, reason="heads of transformers 5")
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "name",
    [
        "roberta-ForMaskedLM",
        "roberta-ForSequenceClassification",
        "electra-ForMaskedLM",
        "distilbert-ForSequenceClassification",
        "distilbert-ForMaskedLM",
    ],
)
def test_a_compiled_model_is_one_graph_with_the_same_results(name, train, monkeypatch):
    monkeypatch.setattr("bertfast.encoder.kernel_support.MIN_SLOTS", 0)
    case = BY_NAME[name]
    patched, hf = pair(case, **no_dropout(case))
    values, _ = inputs(case, hf)
    patched.train(train)
    torch._dynamo.reset()
    compiled = torch.compile(patched, backend="aot_eager", fullgraph=True)
    found = []
    for model in (compiled, patched):
        patched.zero_grad()
        loss = model(**values).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in patched.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    for x, y in zip(*found, strict=True):
        assert_close(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("family_name", ["roberta", "electra", "distilbert"])
def test_second_derivatives_are_those_of_transformers(family_name):
    case = FamilyCase(family_name, "ForSequenceClassification", paddings=("right",))
    patched, hf = pair(case, **no_dropout(case))
    values, _ = inputs(case, hf)
    ids = values.pop("input_ids")
    found = []
    for model in (patched, hf):
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=embeddings, **values).loss
        (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
        gradient.square().sum().backward()
        found.append([gradient.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
