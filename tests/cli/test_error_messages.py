"""Messages for invalid input: what is wrong, where, and what to type instead."""

import os

import pytest
from transformers import BertConfig, BertForPreTraining

from bertfast.cli.main import main
from bertfast.data.tokenizer import save_tokenizer, train_tokenizer
from bertfast.tasks.task import write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a pre-trained model `bert`, and a file `file`."""
    folder = tmp_path_factory.mktemp("messages")
    (folder / "file").touch()
    (folder / "data.tsv").write_text("sentence\tlabel\ngood\tpos\nbad\tneg\n")
    (folder / "text.txt").write_text("A sentence.\n" * 20)
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 20, 128)
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 64}
    BertForPreTraining(BertConfig(vocab_size=128, **sizes)).save_pretrained(folder / "bert")
    save_tokenizer(tokenizer, folder / "bert")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("embed --model-name-or-path bert --output-dir o --input-file no.txt", "--input-file no.txt: no such file"),
        ("embed --model-name-or-path bert --output-dir o --input-file bert", "--input-file bert: is a folder"),
        ("predict --model-name-or-path bert --input-file none", "--input-file none: no such file"),
        ("verify bert --input-file none", "--input-file none: no such file"),
        ("demo --output-dir file", "--output-dir file: file is a file; give a folder"),
        ("pretrain --output-dir file/out --data-dir bert", "--output-dir file/out: file is a file; give a folder"),
        (
            "pretrain --output-dir o --data-dir none",
            "--data-dir none: no such folder; `bertfast prepare --output-dir none` writes it",
        ),
        ("predict --model-name-or-path= --input-file data.tsv", "--model-name-or-path is empty: give a value"),
        ("prepare --output-dir o --train-file text.txt --validation-file=", "--validation-file is empty"),
        ("import none o", "there is no checkpoint none, since none.index is missing"),
        (
            "verify ./no/such/model",
            "./no/such/model is not a folder, and not the id of a model on the hub (OWNER/NAME)\n",
        ),
        ("predict --model-name-or-path bert --input-file data.tsv", "or measure a pre-trained model on text with"),
        ("evaluate --model-name-or-path bert --validation-file data.tsv", "`bertfast evaluate --objective mlm`"),
        (
            "pretrain --output-dir p --train-file text.txt --config-overrides hiden_size=3",
            "'hiden_size' is not a size or option of a BERT configuration; did you mean hidden_size?",
        ),
        (
            "pretrain --output-dir p --train-file text.txt --max-positions 64 "
            "--config-overrides max_position_embeddings=32",
            "--max-positions and max_position_embeddings in --config-overrides set the same value: give only one",
        ),
    ],
)
def test_invalid_input_is_refused_and_the_correction_named(arguments, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    command, *rest = arguments.split()
    assert main([command, *rest]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert f"bertfast {command}: " in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("predict --model-name-or-path bert --input-file {}", "--input-file a\ufffd: no such file"),
        (
            "finetune --model-name-or-path bert --train-file {}.tsv --output-dir o",
            "a\ufffd.tsv, line 2: 1 field where",
        ),
        ("prepare --train-file {} --output-dir o", "a\ufffd"),
        (
            "embed --model-name-or-path {} --output-dir o --input-file text.txt",
            "model a\ufffd: the name is not UTF-8",
        ),
        (
            "embed --model-name-or-path bert --output-dir {} --input-file text.txt",
            "--output-dir a\ufffd: the name is",
        ),
        ("verify {}", "model a\ufffd: the name is not UTF-8, which models need: give another name"),
        ("export bert {}", "--output-dir a\ufffd: the name is not UTF-8"),
        ("pretrain --output-dir {} --train-file text.txt", "--output-dir a\ufffd: the name is not UTF-8"),
    ],
)
def test_names_that_are_not_utf8_are_displayed(arguments, message, folder, monkeypatch, capsys):
    name = os.fsdecode(b"a\xe9")
    (folder / f"{name}.tsv").write_text("sentence\tlabel\ngood\n")
    monkeypatch.chdir(folder)
    assert main(arguments.format(name).split()) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "\\udc" not in error
    assert not (folder / name).exists()


def test_reasons_with_names_that_are_not_utf8_are_written(tmp_path):
    write_rows(tmp_path / "a.tsv", ["skipped"], [[os.fsdecode(b"a\xe9.tsv, line 2: no label")]])
    assert (tmp_path / "a.tsv").read_text(encoding="utf-8") == "skipped\na\ufffd.tsv, line 2: no label\n"
