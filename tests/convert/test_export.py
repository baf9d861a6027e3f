"""`bertfast export`: other libraries load the result, and its outputs are those of the model."""

import json

import pytest
import torch
import transformers
from parity import CASES, EXPORTED_TO_ONNX, SIZES

import bertfast
from bertfast.cli.main import main
from bertfast.models import extensions

KINDS = [case for case in CASES if case.name in EXPORTED_TO_ONNX]


def saved(folder, case):
    torch.manual_seed(0)
    config = bertfast.BertConfig(**SIZES | case.changes)
    model = getattr(bertfast, case.class_name)(config, **case.arguments)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    return model.eval()


@pytest.mark.parametrize("case", [case for case in CASES if not case.arguments], ids=str)
def test_transformers_loads_an_exported_folder(case, tmp_path, capsys):
    model = saved(tmp_path / "model", case)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    assert f"holds a {case.class_name} that transformers can load" in capsys.readouterr().out
    opened = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(12).view(2, 6)
    base = getattr(model, "bert", model)
    torch.testing.assert_close(opened(ids)[0], base(ids)[0], rtol=1e-4, atol=1e-5)
    assert (tmp_path / "out" / "vocab.txt").is_file()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [case.class_name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_torch_export_gives_the_outputs_of_the_model(case, tmp_path, capsys):
    saved(tmp_path / "model", case)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "torch-export"]) == 0
    assert "for any batch size and sequence length" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.pt2").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_onnx_runtime_gives_the_outputs_of_the_model(case, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx`")
    model = saved(tmp_path / "model", case)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "onnx"]) == 0
    assert "for any batch size and sequence length" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    shape = (4, 3, 9) if case.class_name == "BertForMultipleChoice" else (4, 9)
    ids = torch.randint(53, shape)
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        expected = model(**feeds)
    for output in session.get_outputs():
        (result,) = session.run([output.name], {name: x.numpy() for name, x in feeds.items()})
        torch.testing.assert_close(torch.from_numpy(result), expected[output.name], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_torch_export_of_a_patched_model_traces_transformers_code():
    model = transformers.BertModel(transformers.BertConfig(**SIZES, attn_implementation="eager")).eval()
    ids = torch.arange(12).view(2, 6)
    expected = model(ids).last_hidden_state
    bertfast.patch(model)
    rows, columns = torch.export.Dim("rows"), torch.export.Dim("columns", max=16)
    shapes = {"input_ids": {0: rows, 1: columns}}
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes=shapes, strict=False)
    assert not any("bertfast" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(input_ids=ids).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_an_export_of_another_model_is_refused_or_replaced(tmp_path, capsys):
    saved(tmp_path / "model", next(case for case in CASES if case.name == "sequence"))
    saved(tmp_path / "other", next(case for case in CASES if case.name == "question"))
    out = tmp_path / "out"
    for _ in range(2):
        assert main(["export", str(tmp_path / "model"), str(out)]) == 0
    before = (out / "model.safetensors").read_bytes()
    assert main(["export", str(tmp_path / "other"), str(out)]) == 1
    assert "--model-name-or-path was" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before
    assert main(["export", str(tmp_path / "other"), str(out), "--overwrite-output-dir"]) == 0
    assert json.loads((out / "config.json").read_text())["architectures"] == ["BertForQuestionAnswering"]
    (out / "origin.json").unlink()
    assert main(["export", str(tmp_path / "model"), str(out)]) == 1
    assert "without a record" in capsys.readouterr().err


def test_a_damaged_tokenizer_is_not_exported(tmp_path, capsys):
    saved(tmp_path / "model", next(case for case in CASES if case.name == "sequence"))
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 1
    assert "tokenizer.json is cut off or not JSON" in capsys.readouterr().err
    (tmp_path / "model" / "tokenizer.json").unlink()
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(1000))]
    (tmp_path / "model" / "vocab.txt").write_text("\n".join(tokens))
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 1
    assert "they do not belong together" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_graph_that_differs_is_not_written(tmp_path, capsys, monkeypatch):
    saved(tmp_path / "model", next(case for case in CASES if case.name == "sequence"))
    monkeypatch.setattr("bertfast.convert.export._to_program", lambda model, path, *rest: path.write_text("half"))
    monkeypatch.setattr("bertfast.convert.export._difference", lambda *arguments: 1.0)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "torch-export"]) == 1
    assert "model.pt2 is not written: its outputs differ" in capsys.readouterr().err
    assert not [*(tmp_path / "out").glob("*.pt2")]


def test_models_that_transformers_does_not_have_are_refused(tmp_path, capsys):
    case = next(case for case in CASES if case.name == "sequence")
    own = extensions.ExtendedBertConfig(**SIZES, bilstm=True)
    extensions.BertForSequenceClassification(own).save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 1
    assert "has bilstm, which transformers does not have" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    saved(tmp_path / "plain", case)
    assert main(["export", str(tmp_path / "plain"), str(tmp_path / "plain")]) == 1
    assert "which would be replaced" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "plain"), str(tmp_path / "plain"), "--overwrite-output-dir"]) == 1
    assert "which would be replaced" in capsys.readouterr().err
    config = tmp_path / "plain" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["BertForBirds"]}))
    assert main(["export", str(tmp_path / "plain"), str(tmp_path / "out")]) == 1
    assert "config.json names BertForBirds" in capsys.readouterr().err


def test_a_failed_replacement_leaves_the_earlier_export(tmp_path, capsys, monkeypatch):
    cases = {case.name: case for case in CASES}
    saved(tmp_path / "one", cases["sequence"])
    saved(tmp_path / "two", cases["token"])
    arguments = [str(tmp_path / "out"), "--to", "torch-export", "--overwrite-output-dir"]
    monkeypatch.setattr("bertfast.convert.export._to_program", lambda model, path, *rest: path.write_text("graph"))
    monkeypatch.setattr("bertfast.convert.export._difference", lambda *arguments: 0.0)
    assert main(["export", str(tmp_path / "one"), *arguments]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert before["model.pt2"] == b"graph"
    monkeypatch.setattr("bertfast.convert.export._difference", lambda *arguments: 1.0)
    assert main(["export", str(tmp_path / "two"), *arguments]) == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert main(["export", str(tmp_path / "two"), str(tmp_path / "out"), "--overwrite-output-dir"]) == 0
    assert "BertForTokenClassification" in (tmp_path / "out" / "config.json").read_text()
    assert not (tmp_path / "out" / "model.pt2").exists()


def test_another_format_of_the_same_model_is_added(tmp_path, capsys, monkeypatch):
    saved(tmp_path / "model", next(case for case in CASES if case.name == "sequence"))
    monkeypatch.setattr("bertfast.convert.export._to_program", lambda model, path, *rest: path.write_text("graph"))
    monkeypatch.setattr("bertfast.convert.export._difference", lambda *arguments: 0.0)
    for format_ in ("torch-export", "transformers"):
        assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--to", format_]) == 0
    assert (tmp_path / "out" / "model.pt2").read_text() == "graph"
