"""`bertfast verify` and `bertfast bench` compare a model with the same one in transformers."""

import pytest
import torch
from parity import SIZES

import bertfast
from bertfast.cli.main import main

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    bertfast.BertForSequenceClassification(bertfast.BertConfig(**SIZES)).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "vocab.txt").write_text("\n".join(WORDS))
    (tmp_path / "texts.txt").write_text("a b c d e\n\nf\ng h i j k l m n o p q r s t u v w\nx y\n")
    return tmp_path


def arguments(folder, command, *more):
    return [command, str(folder / "model"), "--input-file", str(folder / "texts.txt"), "--device", "cpu", *more]


def test_verify_passes_for_a_correct_model(folder, capsys):
    assert main(arguments(folder, "verify", "--per-device-batch-size", "2")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [
        ["fp32", "outputs"],
        ["fp32", "gradients"],
        ["fp32", "frozen"],
        ["bf16", "outputs"],
        ["bf16", "gradients"],
        ["bf16", "frozen"],
    ]
    assert all(line.endswith(" ok") for line in lines[:-1])
    assert lines[-1].endswith("is as accurate in bertfast as in transformers, on 4 texts.")


def test_verify_in_one_precision_and_in_int8(folder, capsys, caplog, monkeypatch):
    assert main(arguments(folder, "verify", "--precision", "fp32")) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[:-1]} == {"fp32"}
    assert main(arguments(folder, "verify", "--precision", "int8")) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("int8 cosine with fp32   mean ")
    assert first.endswith(" ok")
    assert last.endswith("keeps its accuracy in int8, on 4 texts.")
    assert (
        "different tokens, too few to calibrate int8: give a file with more and longer texts in --input-file"
        in caplog.text
    )
    assert "leave it out" not in caplog.text
    monkeypatch.setattr("bertfast.cli.verify.MEAN_COSINE", 1.5)
    assert main(arguments(folder, "verify", "--precision", "int8")) == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out
    assert "use this model with --precision bf16 or fp32" in printed.err


def test_outputs_that_differ_from_transformers_fail_verify_and_bench(folder, capsys, monkeypatch):
    original = bertfast.BertForSequenceClassification.forward

    def scale_by(factor: float) -> None:
        def forward(self, *args, **kwargs):
            outputs = original(self, *args, **kwargs)
            outputs.logits = outputs.logits * factor
            return outputs

        monkeypatch.setattr(bertfast.BertForSequenceClassification, "forward", forward)

    scale_by(1.001)
    assert main(arguments(folder, "verify")) == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out
    assert "outputs in fp32" in printed.err
    assert "do not use this model with bertfast on this machine" in printed.err
    scale_by(2)
    assert main(arguments(folder, "bench", "--seconds", "0.1")) == 1
    assert "nothing is timed" in capsys.readouterr().err


def test_bench_prints_speedups_and_writes_a_plot(folder, capsys):
    pytest.importorskip("matplotlib")
    plot = folder / "speed.png"
    assert main(arguments(folder, "bench", "--seconds", "0.2", "--plot", str(plot))) == 0
    printed = capsys.readouterr().out
    assert "inference: " in printed
    assert "forward and backward: " in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_an_input_file_without_text_is_refused(folder, capsys):
    (folder / "texts.txt").write_text("\n")
    assert main(arguments(folder, "verify")) == 1
    assert "holds no text: it needs one text per line" in capsys.readouterr().err
