"""Scores of classes and entities, precision-recall curves, and the plots of a run."""

import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_fscore_support
from task_examples import settings_for, write_examples

from bertfast.cli.main import main
from bertfast.runtime.plotting import smoothed
from bertfast.tasks.class_report import confusion_report, precision_recall
from bertfast.tasks.entity_metrics import entity_scores
from bertfast.tasks.metrics import confusion_matrix
from bertfast.training import report_plots
from bertfast.training.finetuning import finetune


def test_scores_of_classes_equal_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 3, 50), rng.integers(0, 4, 50)  # no example is of the last class
    report = confusion_report(list("abcd"), confusion_matrix(labels, predictions, 4))
    expected = precision_recall_fscore_support(labels, predictions, labels=range(4), zero_division=0.0)
    for column, name in zip(expected, ("precision", "recall", "f1", "examples"), strict=True):
        assert [report["classes"][label][name] for label in "abcd"] == pytest.approx(column.tolist())
    assert report["confusion_matrix"]["labels"] == list("abcd")
    assert np.array(report["confusion_matrix"]["counts"])[0, 1] == ((labels == 0) & (predictions == 1)).sum()


def test_scores_of_entities_count_whole_entities_by_type():
    gold = [["B-X", "I-X", "O", "B-Y"], ["B-X", "O", "B-X", "O"]]
    predicted = [["B-X", "I-X", "O", "B-Z"], ["B-X", "O", "B-X", "I-X"]]
    scores = entity_scores(gold, predicted)
    third = pytest.approx(2 / 3)
    assert scores == {
        "X": {"precision": third, "recall": third, "f1": third, "examples": 3},
        "Y": {"precision": 0, "recall": 0, "f1": 0, "examples": 1},
        "Z": {"precision": 0, "recall": 0, "f1": 0, "examples": 0},
    }


@pytest.mark.parametrize("examples", [5, 1000])
def test_the_precision_recall_curve_is_that_of_scikit_learn_with_few_points(examples):
    rng = np.random.default_rng(0)
    positive, scores = np.arange(examples) % 3 == 0, rng.random(examples)
    curve = precision_recall("good", scores, positive)
    assert curve["label"] == "good"
    assert curve["average_precision"] == average_precision_score(positive, scores)
    assert len(curve["precision"]) == len(curve["recall"]) <= 200
    assert (curve["recall"][0], curve["recall"][-1], curve["precision"][-1]) == (1, 0, 1)
    assert curve["precision"][0] == pytest.approx(positive.mean())
    assert sorted(curve["recall"], reverse=True) == curve["recall"]


def test_a_moving_average_starts_without_bias():
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smoothed([0.0, 1.0], decay=0.5) == pytest.approx([0.0, 2 / 3])
    assert smoothed([]) == []


@pytest.mark.slow
def test_a_run_reports_its_classes_and_draws_them(pretrained, files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["--output-dir", str(tmp_path / "out"), "--model-name-or-path", str(pretrained), "--device", "cpu"]
    arguments += ["--train-file", files["train_file"], "--validation-file", files["validation_file"]]
    assert main(["finetune", *arguments, "--learning-rate", "0.003", "--num-train-epochs", "1"]) == 0
    report = json.loads((tmp_path / "out" / "report_validation.json").read_text())
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    counts = np.array(report["confusion_matrix"]["counts"])
    assert counts.sum() == 60
    assert counts.trace() / 60 == pytest.approx(results["eval_accuracy"])
    assert report["classes"]["good"]["f1"] == pytest.approx(results["eval_f1"])
    assert 0.5 < report["precision_recall"]["average_precision"] <= 1
    for name in report_plots.PLOTS:
        assert (tmp_path / "out" / name).stat().st_size > 5000
    where = ["--model-name-or-path", str(tmp_path / "out"), "--validation-file", files["validation_file"]]
    assert main(["evaluate", *where, "--output-dir", str(tmp_path / "again"), "--device", "cpu"]) == 0
    again = json.loads((tmp_path / "again" / "report_validation.json").read_text())
    assert again["confusion_matrix"] == report["confusion_matrix"]
    assert (tmp_path / "again" / "precision_recall.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "found"),
    [
        ("token-classification", {"classes", "confusion_matrix", "entities"}),
        ("multi-label", {"classes"}),
        ("regression", None),
        ("question-answering", None),
    ],
)
def test_what_is_reported_depends_on_the_task(task, found, pretrained, tmp_path):
    file = write_examples(tmp_path, task, 32, seed=0)
    finetune(settings_for(task, pretrained, file, tmp_path / "out", validation_file=str(file), num_train_epochs=1))
    path = tmp_path / "out" / "report_validation.json"
    assert path.exists() == (found is not None)
    if found is not None:
        assert {*json.loads(path.read_text())} == found
    entity_table = "| entity | precision | recall | F1 | examples |" in (tmp_path / "out" / "README.md").read_text()
    assert entity_table == (task == "token-classification")


def test_a_curve_of_one_point_is_seen(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    seen = {}

    def draw(path, size, *panels):
        figure, axes = pyplot.subplots(len(panels))
        for paint, one in zip(panels, axes, strict=True):
            paint(one)
            seen[one.get_ylabel()] = [line.get_marker() for line in one.lines][-1]
        pyplot.close(figure)

    monkeypatch.setattr(report_plots, "draw", draw)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 0.5, "learning_rate": 0.1}\n')
    report_plots.draw_run(tmp_path, "title", "accuracy")
    assert seen == {"training loss": "o", "learning rate": "o"}
    (tmp_path / "metrics.jsonl").write_text("")
    report_plots.draw_run(tmp_path, "title", "accuracy")  # nothing to draw


def test_without_matplotlib_a_run_says_what_to_install(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(report_plots, "load_pyplot", lambda: None)
    caplog.set_level("INFO", "bertfast")
    report_plots.draw_run(tmp_path, "title", "accuracy")
    assert "No plots: they require matplotlib: pip install 'bertfast[plots]'" in caplog.text
    assert not list(tmp_path.glob("*.png"))
