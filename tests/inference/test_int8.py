"""Commands on a CPU: weights are packed once, in int8 if that is asked for or the model's folder is quantised."""

import json
import logging
import re
import weakref

import pytest
import torch
from safetensors.torch import load_file

import bertfast
from bertfast.cli.main import main
from bertfast.data.tokenizer import load_tokenizer, save_tokenizer
from bertfast.encoder.packed_linear import PackedLinear, is_frozen
from bertfast.inference.embed import EmbedSettings, embed
from bertfast.inference.frozen import freeze_on_cpu, uncaptured_buckets
from bertfast.inference.int8_speed import log_int8_speed
from bertfast.inference.predict import PredictSettings, open_finetuned, predict
from bertfast.ops import matmul
from bertfast.tasks.features import BUCKETED, EXACT, Buckets, tokenize

TEXTS = ["the film was good", "bad", "a very bad plot and a good actor", "the", "music with a plot"]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS))
    return str(path)


@pytest.fixture
def packed_dtypes(monkeypatch):
    """Record the dtype of the weights of each packed linear layer that is made."""
    dtypes, make = [], PackedLinear.__init__
    monkeypatch.setattr(
        PackedLinear,
        "__init__",
        lambda self, packed, *group: dtypes.append(packed.operands.dtype) or make(self, packed, *group),
    )
    return dtypes


def vectors(folder) -> torch.Tensor:
    return torch.cat([load_file(path)["embeddings"] for path in sorted(folder.glob("part-*"))])


def embedded(model, folder, texts, precision) -> torch.Tensor:
    assert main(["embed", "--model-name-or-path", str(model), "--output-dir", str(folder), "--input-file", texts,
                 "--device", "cpu", "--texts-per-part", "2", "--precision", precision]) == 0  # fmt: skip
    return vectors(folder)


@pytest.fixture
def int8_folder(tuned, tmp_path):
    """The folder of a fine-tuned model, quantised."""
    source, folder = tuned[0], tmp_path / "int8"
    model = bertfast.AutoModelForSequenceClassification.from_pretrained(source)
    bertfast.quantize(model)
    model.save_pretrained(folder)
    save_tokenizer(load_tokenizer(source), folder)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.usefixtures("any_precision_runs")
def test_inference_on_a_cpu_is_frozen(precision, pretrained, texts, tmp_path, packed_dtypes):
    where = {"model_name_or_path": str(pretrained), "output_dir": str(tmp_path / "out"), "input_file": texts}
    embed(EmbedSettings.of(**where, device="cpu", precision="fp32"))
    assert {*packed_dtypes} == {torch.float32}
    packed_dtypes.clear()
    embedded(pretrained, tmp_path / precision, texts, precision)
    assert {*packed_dtypes} == {torch.float32 if precision == "fp32" else torch.bfloat16}


def test_embeddings_in_int8_are_close_and_do_not_depend_on_interruptions(pretrained, texts, tmp_path, caplog):
    expected = embedded(pretrained, tmp_path / "fp32", texts, "fp32")
    with caplog.at_level(logging.INFO, "bertfast"):
        found = embedded(pretrained, tmp_path / "int8", texts, "int8")
    assert "runs in int8, calibrated on the first 5 inputs" in caplog.text
    assert not torch.equal(found, expected)
    assert torch.cosine_similarity(found, expected).min() >= 0.99
    (tmp_path / "int8" / "part-00001.safetensors").unlink()
    assert torch.equal(embedded(pretrained, tmp_path / "int8", texts, "int8"), found)


def test_predictions_in_int8(tuned, files, capsys, caplog):
    where = {"model_name_or_path": str(tuned[0]), "input_file": files["test_file"], "device": "cpu"}
    labels = []
    for precision in ("fp32", "int8"):
        with caplog.at_level(logging.INFO, "bertfast"):
            predict(PredictSettings.of(**where, precision=precision))
        labels.append([json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()])
    assert "runs in int8, calibrated on the first 32 inputs" in caplog.text
    assert len(labels[0]) == 60
    assert sum(a == b for a, b in zip(*labels, strict=True)) >= 59


@pytest.fixture
def without_dot_products():
    """Run as on a CPU without dot products of int8."""
    torch.ops.bertfast.use_quad_instruction(False)
    yield
    torch.ops.bertfast.use_quad_instruction(True)


@pytest.mark.parametrize(("int8", "level"), [(0.002, "WARNING"), (0.0005, "INFO")], ids=["slower", "faster"])
@pytest.mark.usefixtures("without_dot_products")
def test_commands_say_how_fast_int8_is_without_its_instructions(int8, level, pretrained, texts, tmp_path, caplog,
                                                                monkeypatch):  # fmt: skip
    measured = []
    monkeypatch.setattr(
        "bertfast.inference.int8_speed.seconds_of",
        lambda weights, tokens: measured.append((weights, tokens)) or [int8, 0.001],
    )
    with caplog.at_level(logging.INFO, "bertfast"):
        embedded(pretrained, tmp_path / "int8", texts, "int8")
        assert main(["verify", str(pretrained), "--input-file", texts, "--device", "cpu", "--precision", "int8"]) == 0
    said = [(record.levelname, record.getMessage()) for record in caplog.records if "dot products" in record.msg]
    (first_weights, tokens), _ = measured
    assert [weight.operands.dtype for weight in first_weights] == [torch.int8, torch.float32]
    sentence = (
        f"this CPU has no dot products of int8: {tokens} tokens through a linear layer of 32 x 32 take {1e3 * int8:.2f}"
        f" ms in int8 and 1.00 ms in fp32, so that int8 is {'slower' if level == 'WARNING' else 'faster'} "
        "here than fp32"
    )
    assert said == [(level, sentence)] * 2


@pytest.mark.parametrize("command", ["predict", "embed", "evaluate"])
@pytest.mark.usefixtures("without_dot_products")
def test_commands_say_how_fast_a_saved_int8_model_is(command, int8_folder, files, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("bertfast.inference.int8_speed.seconds_of", lambda weights, tokens: [0.002, 0.001])
    flags = {
        "predict": ["--input-file", files["test_file"]],
        "embed": ["--input-file", files["test_file"], "--output-dir", str(tmp_path / "out"), "--texts-per-part", "9"],
        "evaluate": ["--validation-file", files["validation_file"]],
    }[command]
    assert main([command, "--model-name-or-path", str(int8_folder), "--device", "cpu", *flags]) == 0
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sum("take 2.00 ms in int8 and 1.00 ms in fp32, so that int8 is slower here" in each for each in said) == 1


@pytest.mark.usefixtures("without_dot_products")
def test_fill_mask_says_how_fast_a_saved_int8_model_is(pretrained, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("bertfast.inference.int8_speed.seconds_of", lambda weights, tokens: [0.002, 0.001])
    model = bertfast.AutoModelForMaskedLM.from_pretrained(pretrained)
    bertfast.quantize(model)
    model.save_pretrained(tmp_path)
    save_tokenizer(load_tokenizer(pretrained), tmp_path)
    assert main(["fill-mask", str(tmp_path), "a [MASK] plot"]) == 0
    assert "so that int8 is slower here than fp32" in caplog.text


def test_evaluate_in_int8_measures_the_quantised_model(tuned, files, tmp_path, packed_dtypes, capsys):
    flags = ["--validation-file", files["validation_file"], "--device", "cpu"]
    for precision, folder in (("int8", tuned[0]), ("fp32", tuned[0])):
        assert main(["evaluate", "--model-name-or-path", str(folder), *flags, "--precision", precision]) == 0
        assert "eval_accuracy" in capsys.readouterr().out
        assert {*packed_dtypes} == ({torch.int8} if precision == "int8" else set())
        packed_dtypes.clear()
    assert main(["evaluate", "--model-name-or-path", str(tuned[0]), *flags, "--precision", "int8",
                 "--objective", "mlm"]) in (1, 2)  # fmt: skip
    assert "--precision int8 is for --objective task" in capsys.readouterr().err


def test_texts_of_few_tokens_are_calibrated_on_random_tokens_too(pretrained, tmp_path, caplog, monkeypatch):
    (tmp_path / "texts.txt").write_text("\n".join([*["the"] * 32, *TEXTS]))
    expected = embedded(pretrained, tmp_path / "fp32", str(tmp_path / "texts.txt"), "fp32")
    accuracy = []
    for few in (256, 0):
        monkeypatch.setattr("bertfast.inference.frozen._FEW_TOKENS", few)
        caplog.clear()
        with caplog.at_level(logging.INFO, "bertfast"):
            found = embedded(pretrained, tmp_path / f"int8-{few}", str(tmp_path / "texts.txt"), "int8")
        assert ("calibrated on the first 32 inputs and random tokens" in caplog.text) == (few > 0)
        assert (
            caplog.text.count(
                "there are only 3 different tokens in the first 32 inputs, so that int8 is calibrated on random"
            )
            == 1
        )
        accuracy.append(torch.cosine_similarity(found, expected)[32:].mean())
    assert accuracy[0] > accuracy[1]


@pytest.mark.usefixtures("without_dot_products")
def test_a_part_of_large_batches_is_measured(caplog):
    model = bertfast.BertModel(bertfast.preset_config("base", num_hidden_layers=1))
    bertfast.quantize(model)
    with caplog.at_level(logging.INFO, "bertfast"):
        log_int8_speed(model, 8192)
    assert re.search(r": 84 tokens through a linear layer of 768 x 768 take [\d.]+ ms in int8", caplog.text)


def test_nothing_is_measured_with_dot_products_of_int8(pretrained, texts, tmp_path, caplog):
    if not torch.ops.bertfast.has_quad_instruction():
        pytest.skip("this CPU has no dot products of int8")
    with caplog.at_level(logging.INFO, "bertfast"):
        embedded(pretrained, tmp_path / "int8", texts, "int8")
    assert "dot products" not in caplog.text


def test_the_folder_of_a_quantised_model_is_run_by_predict_and_embed(int8_folder, files, texts, tmp_path, capsys):
    assert main(["predict", "--model-name-or-path", str(int8_folder), "--input-file", files["test_file"],
                 "--device", "cpu"]) == 0  # fmt: skip
    assert len(capsys.readouterr().out.splitlines()) == 60
    found = embedded(int8_folder, tmp_path / "auto", texts, "auto")
    assert torch.equal(embedded(int8_folder, tmp_path / "int8-vectors", texts, "int8"), found)
    opened = bertfast.AutoModel.from_pretrained(int8_folder)
    features = tokenize(load_tokenizer(int8_folder), TEXTS[:1], 24)
    with torch.no_grad():
        hidden = opened(input_ids=torch.from_numpy(features.token_ids[None]).long()).last_hidden_state
    assert torch.cosine_similarity(found[0], hidden[0].mean(0), dim=0) >= 0.999


@pytest.mark.parametrize("flags", [[], ["--pooling", "mean"]], ids=["own", "named"])
def test_embed_warns_of_a_quantised_folder_without_modules(int8_folder, flags, texts, tmp_path, capsys):
    assert main(["embed", "--model-name-or-path", str(int8_folder), "--input-file", texts, "--device", "cpu",
                 "--output-dir", str(tmp_path / "vectors"), *flags]) == 0  # fmt: skip
    assert ("is quantised and has no modules.json" in capsys.readouterr().err) == (not flags)


def test_other_programs_that_only_run_a_model_open_a_quantised_one(int8_folder, pretrained, files, tmp_path, capsys):
    assert main(["evaluate", "--model-name-or-path", str(int8_folder), "--validation-file", files["validation_file"],
                 "--device", "cpu"]) == 0  # fmt: skip
    assert "eval_accuracy" in capsys.readouterr().out
    model = bertfast.AutoModelForMaskedLM.from_pretrained(pretrained)
    bertfast.quantize(model)
    model.save_pretrained(tmp_path / "masked")
    save_tokenizer(load_tokenizer(pretrained), tmp_path / "masked")
    assert main(["fill-mask", str(tmp_path / "masked"), "a [MASK] plot"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 6
    assert main(["predict", "--model-name-or-path", str(tmp_path / "masked"), "--input-file",
                 files["validation_file"], "--device", "cpu"]) == 1  # fmt: skip
    assert "fine-tune the model from which it was quantised with `bertfast finetune`" in capsys.readouterr().err


def test_what_does_not_run_a_quantised_model_says_so(int8_folder, files, texts, tmp_path, capsys, monkeypatch):
    folder = str(int8_folder)
    for call, message in (
        (["embed", "--precision", "fp32", "--output-dir", str(tmp_path / "out"), "--input-file", texts],
         "is quantised to int8: leave --precision fp32 out"),
        (["finetune", "--train-file", files["train_file"], "--output-dir", str(tmp_path / "tuned")],
         "is quantised to int8, which `bertfast predict`, `embed`, `search`, `fill-mask` and `evaluate"),
        (["evaluate", "--validation-file", files["validation_file"], "--precision", "fp32"],
         "is quantised to int8: leave --precision fp32 out"),
    ):  # fmt: skip
        assert main([*call, "--model-name-or-path", folder, "--device", "cpu"]) == 1
        assert message in capsys.readouterr().err
    monkeypatch.delattr("bertfast.cli.compare.docstring_documents")  # which take minutes: the folder comes first
    for input_file in (["--input-file", texts], []):
        assert main(["verify", folder, *input_file, "--device", "cpu"]) == 1
        assert "give the model from which it was made" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_training_refuses_int8(command, capsys):
    try:
        status = main([command, "--precision", "int8"])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    printed = capsys.readouterr().err
    assert "invalid choice 'int8' for argument '--precision'" in printed
    assert "'fp32', 'bf16', 'fp16')" in printed


def test_memory_of_unpacked_weights_is_freed(tuned):
    settings = PredictSettings.of(model_name_or_path=str(tuned[0]), device="cpu", precision="fp32")
    task, model, tokenizer = open_finetuned(settings)
    weights = [weakref.ref(layer.output.dense.weight) for layer in model.bert.encoder.layer]
    features = tokenize(tokenizer, TEXTS, 24)
    freeze_on_cpu(model, "fp32", features, lambda inputs: task.logits(model, inputs))
    assert is_frozen(model)
    assert not any(weight() is not None for weight in weights)


def test_batches_of_a_frozen_model_are_not_padded_but_for_its_head(pretrained, monkeypatch):
    """oneDNN keeps code per shape for what is multiplied by weights that are not packed: there, in half precision."""
    monkeypatch.setattr(matmul, "onednn_depth", lambda: 0)
    monkeypatch.setattr("bertfast.runtime.torch_compat.cpu_has_amx", lambda: False)
    model = bertfast.AutoModelForTokenClassification.from_pretrained(pretrained)
    assert uncaptured_buckets(model, "fp32", logits_per_token=True) == EXACT
    assert uncaptured_buckets(model, "bf16") == BUCKETED
    bertfast.freeze(model, "bf16")
    for precision in ("fp32", "int8"):
        assert uncaptured_buckets(model, precision, logits_per_token=True) == EXACT
    assert uncaptured_buckets(model, "bf16") == Buckets(tokens=False, examples=True)
    assert uncaptured_buckets(model, "bf16", logits_per_token=True) == BUCKETED


def test_packed_weights_that_onednn_multiplies_are_padded(pretrained, monkeypatch):
    monkeypatch.setattr("bertfast.runtime.torch_compat.cpu_has_amx", lambda: True)
    monkeypatch.setattr("bertfast.ops.packed_linear.cpu_has_amx", lambda: True)
    padded = []
    for precision in ("fp32", "bf16"):
        model = bertfast.AutoModel.from_pretrained(pretrained)
        bertfast.freeze(model, precision)
        padded.append(uncaptured_buckets(model, precision).tokens)
    assert padded == [False, True]
