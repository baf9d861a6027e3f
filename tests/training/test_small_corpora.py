"""Pre-training and evaluation on one document, or a dozen, with default settings."""

import json

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
