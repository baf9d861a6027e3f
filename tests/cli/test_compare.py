"""`bertfast verify` and `bertfast bench` on a model of one's own."""

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


def test_a_model_is_verified(folder, capsys):
    assert main(arguments(folder, "verify", "--per-device-batch-size", "2")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["fp32", "outputs"],
        ["fp32", "gradients"],
        ["bf16", "outputs"],
        ["bf16", "gradients"],
    ]
    assert all(line.endswith(" ok") for line in lines[:4])
    assert lines[4].endswith("is as accurate here as in transformers, on 4 texts.")


def test_what_differs_is_found(folder, capsys, monkeypatch):
    plain = bertfast.BertForSequenceClassification.forward

    def scale_by(factor: float) -> None:
        def forward(self, *args, **kwargs):
            outputs = plain(self, *args, **kwargs)
            outputs.logits = outputs.logits * factor
            return outputs

        monkeypatch.setattr(bertfast.BertForSequenceClassification, "forward", forward)

    scale_by(1.001)
    assert main(arguments(folder, "verify")) == 1
    told = capsys.readouterr()
    assert "WRONG" in told.out
    assert "outputs in fp32" in told.err
    assert "do not rely on this model here" in told.err
    scale_by(2)
    assert main(arguments(folder, "bench", "--seconds", "0.1")) == 1
    assert "nothing is timed" in capsys.readouterr().err


def test_speed_is_told_and_drawn(folder, capsys):
    pytest.importorskip("matplotlib")
    picture = folder / "speed.png"
    assert main(arguments(folder, "bench", "--seconds", "0.2", "--picture", str(picture))) == 0
    told = capsys.readouterr().out
    assert "inference: " in told
    assert "forward and backward: " in told
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_no_text_is_one_sentence(folder, capsys):
    (folder / "texts.txt").write_text("\n")
    assert main(arguments(folder, "verify")) == 1
    assert "there is no text in" in capsys.readouterr().err
