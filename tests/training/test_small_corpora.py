"""Pre-training and evaluation on one document, or a dozen, with default settings."""

import json
import os
import threading
from contextlib import contextmanager

import pytest
from runs import SIZES

from bertfast.cli.main import main
from bertfast.runtime.settings import counted
from bertfast.training.evaluate import EvaluateSettings, evaluate

SENTENCE = "the film number {} was good and the plot was bad."


def write(path, documents):
    works = (
        "\n".join(SENTENCE.format(f"{work} {sentence}").capitalize() for sentence in range(20))
        for work in range(documents)
    )
    path.write_text("\n\n".join(works))
    return str(path)


@pytest.mark.parametrize("documents", [1, 12])
@pytest.mark.parametrize("initial", ["none", "a model"])
def test_a_small_corpus_pretrains_with_default_settings(documents, initial, pretrained, tmp_path, capsys):
    from_nothing = ["--config-overrides", SIZES, "--vocab-size", "128"]
    model = ["--init-from", str(pretrained)] if initial == "a model" else from_nothing
    text = write(tmp_path / "text.txt", documents)
    small = ["--max-seq-length", "24", "--processes", "1", "--device", "cpu"]
    assert main(["pretrain", "--train-file", text, "--output-dir", str(tmp_path / "out"), *model, *small]) == 0
    entries = list(map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()))
    validated = [entry for entry in entries if "validation_loss" in entry]
    assert validated[-1]["validation_loss"] > 0
    assert validated[-1]["next_sentence_accuracy"] >= 0
    out, err = capsys.readouterr()
    assert out == f"Model, metrics.jsonl and checkpoints are in {tmp_path / 'out'}.\n"
    for progress in ("held out for validation: ", "M parameters", "estimated memory", "validation loss"):
        assert progress in err


def test_a_text_of_three_sentences_is_refused_with_what_is_required(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("One. Two. Three.")
    assert main(["pretrain", "--train-file", str(tmp_path / "text.txt"), "--output-dir", str(tmp_path / "out")]) == 1
    assert "the text has 3 sentences and at least 4 are required" in capsys.readouterr().err


@pytest.mark.parametrize("documents", [1, 2])
def test_one_document_is_evaluated_without_pairs(documents, pretrained, tmp_path, caplog):
    text = write(tmp_path / "text.txt", documents)
    settings = EvaluateSettings.of(
        model_name_or_path=str(pretrained), validation_file=text, objective="mlm", device="cpu", precision="fp32"
    )
    with caplog.at_level("INFO"):
        metrics = evaluate(settings)
    assert f"text: {counted(documents, 'document')}, " in caplog.text
    assert "held out" not in caplog.text
    assert metrics["validation_loss"] > 0
    assert ("next_sentence_accuracy" in metrics) == (documents == 2)


@contextmanager
def named_pipe(path, text):
    """Write a text to a named pipe, from which the body reads it."""
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(text,))
    writer.start()
    yield path
    writer.join()


def test_text_that_can_be_read_only_once_is_evaluated_like_a_file(pretrained, tmp_path, pipe):
    file = write(tmp_path / "text.txt", 1)
    text = (tmp_path / "text.txt").read_text()
    fixed = {"model_name_or_path": str(pretrained), "objective": "mlm", "device": "cpu", "precision": "fp32"}
    expected = evaluate(EvaluateSettings.of(validation_file=file, output_dir=str(tmp_path / "a"), **fixed))
    pipe(text)
    assert evaluate(EvaluateSettings.of(validation_file="-", output_dir=str(tmp_path / "b"), **fixed)) == expected
    with named_pipe(tmp_path / "pipe", text) as path:
        # The same text as that of the results in the folder, so that these are of the same origin.
        settings = EvaluateSettings.of(validation_file=str(path), output_dir=str(tmp_path / "a"), **fixed)
        assert evaluate(settings) == expected
    pipe(b"One.\n\xff\n")
    with pytest.raises(ValueError, match=r"^standard input, line 2: not UTF-8"):
        evaluate(EvaluateSettings.of(validation_file="-", **fixed))
    with named_pipe(tmp_path / "other", "") as path, pytest.raises(ValueError, match=f"there is no text in {path}"):
        evaluate(EvaluateSettings.of(validation_file=str(path), **fixed))


def test_labelled_data_may_come_from_a_pipe(tuned, files, tmp_path):
    fixed = {"model_name_or_path": str(tuned[0]), "device": "cpu"}
    file = files["validation_file"]
    expected = evaluate(EvaluateSettings.of(validation_file=file, **fixed))
    suffix = file.rpartition(".")[2]
    with open(file) as opened, named_pipe(tmp_path / f"pipe.{suffix}", opened.read()) as path:
        found = evaluate(EvaluateSettings.of(validation_file=str(path), output_dir=str(tmp_path / "out"), **fixed))
    assert found == expected
