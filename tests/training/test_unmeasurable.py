"""Validation data that leaves metrics undefined: refused if the deciding one is, and else the metric is left out."""

import json
from pathlib import Path

import pytest
from sentiment import QUICK
from task_examples import write_examples
from text_pairs import write_pairs

from bertfast.cli.main import main
from bertfast.training.finetuning import FinetuneSettings, finetune

pytestmark = pytest.mark.slow

UNMEASURABLE = {
    "regression": ("a.tsv", "sentence\tlabel\ngood film\t2.5\nbad film\t2.5\n", "every label is 2.5"),
    "cola": ("a.tsv", "sentence\tlabel\ngood film\t1\nbad film\t1\n", "every label is '1'"),
    "mrpc": ("a.tsv", "#1 String\t#2 String\tQuality\ngood\tfilm\t0\nbad\tfilm\t0\n", "no label is '1'"),
    "multi-label": ("a.jsonl", '{"text": "film", "label": []}\n', "no example has a label"),
    "token-classification": ("a.conll", "film\tO\nwas\tO\n", "no tag marks an entity"),
    "embedding": (
        "a.tsv",
        "sentence1\tsentence2\tscore\ngood\tfilm\t0.5\nbad\tfilm\t0.5\n",
        "every score is 0.5",
    ),
    "reranking": ("a.tsv", "query\tdocument\tlabel\ngood\tfilm\t0\ngood\tbad\t0\n", "every label is 0"),
}
DECIDING = {
    "regression": "pearson",
    "cola": "matthews_correlation",
    "mrpc": "f1",
    "multi-label": "f1_micro",
    "token-classification": "f1",
    "embedding": "spearmanr",
    "reranking": "spearmanr",
}


def write_train(folder: Path, task: str) -> Path:
    folder.mkdir(exist_ok=True)
    if task in ("embedding", "reranking"):
        return write_pairs(folder / "train.tsv", "scored" if task == "embedding" else "labelled", 12)
    if task in ("cola", "mrpc"):
        names = "sentence\tlabel" if task == "cola" else "#1 String\t#2 String\tQuality"
        texts = ("good film", "bad film") if task == "cola" else ("good\tfilm", "bad\tfilm")
        rows = [f"{text}\t{label}" for label, text in enumerate(texts)] * 6
        (folder / "train.tsv").write_text("\n".join([names, *rows]))
        return folder / "train.tsv"
    return write_examples(folder, task, 12, seed=0)


def settings_for(task: str, model: Path, folder: Path, **changes) -> FinetuneSettings:
    name, text, _ = UNMEASURABLE[task]
    (folder / name).write_text(text)
    files = {"train_file": str(write_train(folder / "train", task)), "validation_file": str(folder / name)}
    where = {"model_name_or_path": str(model), "output_dir": str(folder / "out"), "max_steps": 2}
    return FinetuneSettings.of(**QUICK | where | files | {"task": task} | changes)


@pytest.mark.parametrize("task", UNMEASURABLE)
def test_a_deciding_metric_that_is_undefined_is_refused_before_the_run(task, pretrained, tmp_path):
    message = f"{UNMEASURABLE[task][2]}, so {DECIDING[task]} cannot be measured: give other validation data"
    with pytest.raises(ValueError, match=message):
        finetune(settings_for(task, pretrained, tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_limit_of_samples_is_named_as_the_cause(split, pretrained, tmp_path):
    settings = settings_for("embedding", pretrained, tmp_path, **{f"max_{split}_samples": 1})
    message = rf"with --max-{split}-samples 1, every score is .*: choose more samples"
    with pytest.raises(ValueError, match=message):
        finetune(settings.replace(validation_file=settings.train_file))


OTHERS = {"regression": "loss", "cola": "accuracy", "multi-label": "accuracy", "token-classification": "accuracy"}


@pytest.mark.parametrize("task", OTHERS)
def test_other_metrics_are_measured_without_the_undefined_ones(task, pretrained, tmp_path, caplog, capsys):
    results = finetune(settings_for(task, pretrained, tmp_path, metric_for_best_model=OTHERS[task]))
    assert f"eval_{OTHERS[task]}" in results
    assert f"eval_{DECIDING[task]}" not in results
    assert caplog.text.count("cannot be measured") >= 1
    entries = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert not any(f"eval_{DECIDING[task]}" in entry for entry in entries)
    arguments = ["--model-name-or-path", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["evaluate", *arguments, "--validation-file", str(tmp_path / UNMEASURABLE[task][0])]) == 0
    assert f"eval_{DECIDING[task]} " not in capsys.readouterr().out


@pytest.mark.parametrize("task", ["embedding", "reranking"])
def test_evaluate_refuses_data_of_which_nothing_can_be_measured(task, pretrained, tmp_path, capsys):
    settings = settings_for(task, pretrained, tmp_path)
    finetune(settings.replace(validation_file=settings.train_file))
    capsys.readouterr()
    arguments = ["--model-name-or-path", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["evaluate", *arguments, "--validation-file", settings.validation_file]) == 1
    assert f"{UNMEASURABLE[task][2]}, so nothing can be measured: give other data" in capsys.readouterr().err


def test_equal_predictions_are_worse_than_any_others(pretrained, tmp_path, monkeypatch):
    """The first validation is of a model that predicts the same for all, and is not the best."""
    settings = settings_for("embedding", pretrained, tmp_path, eval_steps=1)
    settings = settings.replace(validation_file=settings.train_file)
    measured = []

    def measure(similarities, scores):
        measured.append(len(measured))
        return dict.fromkeys(("spearmanr", "pearson"), float("nan") if len(measured) == 1 else -0.5)

    monkeypatch.setattr("bertfast.tasks.embedding.correlations", measure)
    results = finetune(settings)
    assert (results["best_step"], results["eval_spearmanr"]) == (2, -0.5)
