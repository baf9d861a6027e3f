"""`bertfast.freeze`: packed weights compute what the model computed, and what would change them is refused."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import family_models
import pytest
import torch
import transformers
from helpers import assert_as_accurate_as_torch
from live_models import Doubled, batch, live, outputs_of
from parity import double
from safetensors.torch import load_file

import bertfast
from bertfast.encoder.packed_layer import PackedLayer
from bertfast.encoder.packed_linear import PackedLinear

FROZEN = "this model is frozen for inference: load it again to train or change it"


def frozen(model, precision=None):
    result = copy.deepcopy(model)
    bertfast.freeze(result, precision)
    return result


def assert_same_outputs(actual, hf, values, mask, autocast=None):
    """Check all outputs of a frozen model by the parity rule, against transformers in its precision."""
    with torch.no_grad():
        truth = dict(double(hf)(**{k: x.double() if x.is_floating_point() else x for k, x in values.items()}).items())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            expected = dict(hf(**values).items())
    outputs = dict(actual(**values).items())
    assert outputs.keys() == expected.keys()
    for name, x in outputs.items():
        if not isinstance(x, torch.Tensor):
            continue
        pair = [each[mask] if each.shape[:2] == mask.shape else each for each in (x, expected[name], truth[name])]
        factor = 6 if name == "loss" else 2  # a single number, which transformers may happen to compute exactly
        assert_as_accurate_as_torch(*pair, name=name, dtype=autocast or x.dtype, factor=factor)
        assert not x.requires_grad


@pytest.fixture
def calls_of_layers(monkeypatch):
    """Count the layers that run as one call of the library."""
    calls, run = [], PackedLayer.__call__
    monkeypatch.setattr(PackedLayer, "__call__", lambda self, *args: calls.append(1) or run(self, *args))
    return calls


CASES = [case for case in family_models.CASES if case.task in ("Model", "ForSequenceClassification", "ForMaskedLM")]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_family_computes_the_same(case, precision, calls_of_layers):
    hf = family_models.plain(case)
    model = frozen(hf, precision)
    values, mask = family_models.inputs(case, hf)
    assert_same_outputs(model, hf, values, mask, None if precision == "fp32" else torch.bfloat16)
    if case.task == "ForMaskedLM":  # others read the first token, which left padding masks out
        assert len(calls_of_layers) == (0 if case.family in family_models.ROTARY else 2)


@pytest.mark.parametrize("padding", ["none", "right", "left", "inside", "first"])
@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu_new"}, {"hidden_act": "relu"}], ids=str)
def test_every_padding_computes_the_same(padding, changes, calls_of_layers):
    hf = live(attn_implementation="eager", **changes)
    values = batch(padding)
    assert_same_outputs(frozen(hf), hf, values, values["attention_mask"].bool())
    reads_masked = padding in ("left", "first")  # [CLS] is then a query-only token
    assert len(calls_of_layers) == (0 if changes.get("hidden_act") == "relu" or reads_masked else 2)


def test_a_bf16_model_keeps_its_dtype():
    hf = live().bfloat16()
    model = frozen(hf)
    reference = copy.deepcopy(hf).double()
    actual, expected, truth = (outputs_of(each).logits for each in (model, hf, reference))
    assert actual.dtype == torch.bfloat16
    assert_as_accurate_as_torch(actual, expected, truth)


@pytest.mark.parametrize("length", [1, 2, 5, 13])
def test_one_sentence_without_padding(length, monkeypatch, calls_of_layers):
    """Few tokens run on packed weights too, where other models are left to transformers."""
    monkeypatch.setattr("bertfast.encoder.kernel_support.MIN_SLOTS_WITHOUT_PADDING", 128)
    hf = live(attn_implementation="eager")
    values = {"input_ids": batch("none")["input_ids"][:1, :1].expand(1, length).contiguous()}
    assert_same_outputs(frozen(hf), hf, values, torch.ones(1, length, dtype=torch.bool))
    assert len(calls_of_layers) == 2


def test_what_would_change_it_is_refused_and_changes_nothing():
    model = frozen(live())
    before = outputs_of(model).logits
    state = live(seed=1).state_dict()
    for change in (
        lambda: model.train(),
        lambda: model.bert.train(),
        lambda: model.bert.encoder.layer[0].train(),
        lambda: model.load_state_dict(state),
        lambda: torch.nn.Sequential(model).load_state_dict({f"0.{name}": x for name, x in state.items()}),
        lambda: bertfast.unpatch(model),
        lambda: model.half(),
        lambda: model.double(),
        lambda: model.to("meta"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=FROZEN):
            change()
    assert torch.equal(outputs_of(model).logits, before)
    assert not any(module.training for module in model.modules())
    model.eval().float().to("cpu")  # what it is already


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cast_is_refused_exactly_if_it_changes_a_tensor(dtype, precision):
    model = live().to(dtype)
    bertfast.quantize(model) if precision == "int8" else bertfast.freeze(model, precision)
    before = outputs_of(model).logits
    for part in (model, model.bert.encoder.layer[0].attention.self, torch.nn.Sequential(model)):
        assert part.to(dtype) is part
        for other in {torch.float32, torch.bfloat16, torch.float16} - {dtype}:
            with pytest.raises(RuntimeError, match=FROZEN):
                part.to(other)
    assert torch.equal(outputs_of(model).logits, before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_autocast_changes_nothing(case):
    model = frozen(family_models.plain(case))
    values, _ = family_models.inputs(case, model)
    del values["labels" if "labels" in values else "attention_mask"]
    expected = model(**values)[0]
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(**values)[0]
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)


def test_options_that_change_afterwards_are_read():
    hf = live(attn_implementation="eager")
    model = frozen(hf)
    outputs_of(model)
    for each in (hf, model):
        each.bert.encoder.layer[0].attention.self.scaling = 0.5
    torch.testing.assert_close(outputs_of(model).logits, outputs_of(hf).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the tracer, about sizes
def test_graphs_are_made_before():
    model = frozen(live("BertModel"))
    ids = batch()["input_ids"]
    with pytest.raises(RuntimeError, match="trace or export it before it is frozen"):
        torch.jit.trace(model, ids, strict=False)
    with pytest.raises(Exception, match="trace or export it before it is frozen"):
        torch.export.export(model, (), {"input_ids": ids}, strict=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", [case for case in CASES if case.task == "Model"], ids=str)
def test_a_compiled_model_computes_the_same(family):
    model = frozen(family_models.plain(family))
    values, _ = family_models.inputs(family, model)
    del values["attention_mask"]
    expected = model(**values).last_hidden_state
    actual = torch.compile(model, backend="aot_eager", fullgraph=True)(**values).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outputs", [{}, {"output_hidden_states": True}, {"output_attentions": True}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_refused(precision, outputs):
    model = frozen(live("BertModel", attn_implementation="eager"), precision)
    embeddings = torch.randn(2, 5, 64, requires_grad=True)
    assert not model(inputs_embeds=embeddings.detach(), **outputs).last_hidden_state.requires_grad
    with pytest.raises(RuntimeError, match=FROZEN):
        model(inputs_embeds=embeddings, **outputs)
    with torch.no_grad():
        model(inputs_embeds=embeddings, **outputs)


def test_it_is_saved_as_what_it_was(tmp_path):
    hf = live()
    frozen(hf).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert all(torch.equal(x, hf.state_dict()[name]) for name, x in loaded.state_dict().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_saved_in_its_own_dtype(dtype, precision, tmp_path):
    hf = live().to(dtype)
    frozen(hf, precision).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {x.dtype for x in saved.values()} == {dtype}
    assert transformers.AutoConfig.from_pretrained(tmp_path).dtype == dtype
    linear = [name for name in saved if ".layer." in name and name.endswith("dense.weight")]
    rounded = torch.bfloat16 if precision == "bf16" else dtype
    for name, x in hf.state_dict().items():
        expected = x.to(rounded).to(dtype) if name in linear or (".self." in name and "weight" in name) else x
        assert torch.equal(saved[name], expected), name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_copy_computes_the_same_and_shares_as_much(precision):
    model = live()
    bertfast.quantize(model) if precision == "int8" else bertfast.freeze(model, precision)
    expected, pickled = outputs_of(model).logits, pickle.dumps(model)
    for again in (copy.deepcopy(model), pickle.loads(pickled)):
        assert torch.equal(outputs_of(again).logits, expected)
        attention = again.bert.encoder.layer[0].attention.self
        assert attention.query.group is attention.value.group
        parts = (attention.query.packed, attention.key.packed, attention.query.group)
        assert len({part.operands.untyped_storage().data_ptr() for part in parts}) == 1
    assert len(pickle.dumps(again)) < 1.05 * len(pickled)


def batches_of_shapes(case, hf):
    """Return batches of one to eight sequences, of one to all tokens, with padding."""
    values, _ = family_models.inputs(case, hf)
    rows, length = values["input_ids"].shape
    shapes = [(1, 1), (1, 2), (1, length), (2, 5), (rows, 3), (rows, length), (2 * rows, length - 1), (8, 7)]
    generator, batches = torch.Generator().manual_seed(0), []
    for sequences, tokens in shapes:
        lengths = torch.randint(1, tokens + 1, (sequences, 1), generator=generator)
        lengths[0] = tokens
        ids = torch.randint(5, hf.config.vocab_size, (sequences, tokens), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": (torch.arange(tokens) < lengths).long()})
    return batches


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("case", [case for case in CASES if case.task == "Model"], ids=str)
def test_eight_threads_compute_what_one_does(case, precision):
    """Calls of different shapes at the same time share no buffer: each output is bitwise that of a call alone."""
    hf = family_models.plain(case)
    batches = batches_of_shapes(case, hf)
    if precision == "int8":
        bertfast.quantize(model := copy.deepcopy(hf), batches[:2])
    else:
        model = frozen(hf, precision)
    threads, all_ready = torch.get_num_threads(), Barrier(8)
    torch.set_num_threads(1)
    try:
        expected = [model(**values).last_hidden_state for values in batches]

        def each_batch_from(first):
            all_ready.wait(60)
            order = [(first + offset) % len(batches) for offset in range(5 * len(batches))]
            return all(torch.equal(model(**batches[n]).last_hidden_state, expected[n]) for n in order)

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(each_batch_from, range(8)))
    finally:
        torch.set_num_threads(threads)


def test_modules_that_are_replaced_or_watched_afterwards_are_called(calls_of_layers):
    hf = live()
    model = frozen(hf)
    outputs_of(model)
    for each in (hf, model):
        each.bert.encoder.layer[0].output.dense = Doubled(each.bert.encoder.layer[0].output.dense)
    torch.testing.assert_close(outputs_of(model).logits, outputs_of(hf).logits, rtol=1e-4, atol=1e-5)
    seen = []
    model.bert.encoder.layer[1].intermediate.dense.register_forward_hook(lambda *call: seen.append(call[2]))
    torch.testing.assert_close(outputs_of(model).logits, outputs_of(hf).logits, rtol=1e-4, atol=1e-5)
    assert len(seen) == 1
    assert len(calls_of_layers) == 3  # two before, and the second layer alone


def test_adapters_stay_as_they_are():
    hf = live()
    hf.bert.encoder.layer[0].output.dense = Doubled(hf.bert.encoder.layer[0].output.dense)
    model = frozen(hf)
    assert type(model.bert.encoder.layer[0].output.dense) is Doubled
    torch.testing.assert_close(outputs_of(model).logits, outputs_of(hf).logits, rtol=1e-4, atol=1e-5)


def test_queries_keys_and_values_share_one_weight():
    attention = frozen(live()).bert.encoder.layer[0].attention.self
    assert isinstance(attention.query, PackedLinear)
    assert attention.key.packed.operands.data_ptr() == attention.query.group.operands[2].data_ptr()
    assert attention.query.group is attention.value.group


def test_the_report_names_what_is_packed():
    model = live()
    report = bertfast.freeze(model)
    assert report.fused["bert.encoder.layer.1"] == "runs on packed tokens and packed weights"
    assert not report.left
    assert str(bertfast.report(model)) == str(report)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_frozen_model_stays_frozen_in_its_precision(precision):
    model = frozen(live(), precision)
    before, layers = outputs_of(model).logits, [*model.modules()]
    for again in (None, precision):
        assert str(bertfast.freeze(model, again)) == str(bertfast.report(model))
    other = "bf16" if precision == "fp32" else "fp32"
    with pytest.raises(ValueError, match=f"this model is frozen in {precision}: load it again to freeze it in {other}"):
        bertfast.freeze(model, other)
    with pytest.raises(ValueError, match=f"this model is frozen in {precision}: load it again to quantise it"):
        bertfast.quantize(model, [batch()])
    assert layers == [*model.modules()]
    assert torch.equal(outputs_of(model).logits, before)


def test_a_model_of_which_a_part_is_frozen_is_refused():
    first, second = live("BertModel"), live("BertModel", seed=1)
    bertfast.freeze(first)
    both = torch.nn.ModuleList([first, second])
    with pytest.raises(
        ValueError, match="a part of this model is frozen in fp32: load it again to freeze it as a whole"
    ):
        bertfast.freeze(both)
    assert type(second) is transformers.BertModel
    bertfast.freeze(second)
    bertfast.freeze(both)


def test_what_cannot_be_frozen():
    with pytest.raises(TypeError, match="freeze takes a torch module that holds an encoder, not a str"):
        bertfast.freeze("bert-base-uncased")
    with pytest.raises(ValueError, match="there is nothing to fuse in this Linear"):
        bertfast.freeze(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"float16: frozen models are float32 or bfloat16, call model.float\(\)"):
        bertfast.freeze(live().half())
    with pytest.raises(ValueError, match="is on meta: frozen models run on a CPU, load its weights first"):
        bertfast.freeze(live().to("meta"))
    with pytest.raises(ValueError, match="precision must be fp32 or bf16, got 'int4'"):
        bertfast.freeze(live(), "int4")


PEAK = """
import re, sys
from pathlib import Path
import torch
from transformers import BertConfig
import bertfast
from bertfast.models.quantised_files import restore_quantised

def memory(entry):
    return int(re.search(entry + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 16}
batch = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
ways = {
    "fp32": lambda model, opened: bertfast.freeze(model, "fp32"),
    "bf16": lambda model, opened: bertfast.freeze(model, "bf16"),
    "int8": lambda model, opened: bertfast.quantize(model, [batch]),
    "opened": lambda model, opened: restore_quantised(model, opened, "folder"),
}
for way, pack in ways.items():
    model = bertfast.BertModel(BertConfig(vocab_size=64, **sizes)).eval()
    with torch.no_grad():
        model(**batch)
    opened = {
        name: (torch.ones(part.weight.shape, dtype=torch.int8), *map(torch.ones, (part.out_features, part.in_features)))
        for name, part in model.named_modules()
        if ".layer." in name and type(part) is torch.nn.Linear and way == "opened"
    }
    layer = sum(p.numel() * p.element_size() for p in model.encoder.layer[0].parameters())
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    pack(model, opened)
    print(way, (memory("VmHWM") - before) / layer)
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell the peak of memory")
def test_the_model_and_its_packed_weights_are_never_both_in_memory():
    """The peak lies at most six of sixteen layers above the memory of the model before; the allocator adds some."""
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True)
    peaks = {way: float(layers) for way, layers in map(str.split, run.stdout.splitlines())}
    assert {*peaks} == {"fp32", "bf16", "int8", "opened"}, run.stderr
    assert max(peaks.values()) < 6, peaks
