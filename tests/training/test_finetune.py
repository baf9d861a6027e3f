"""Fine-tuning a tiny model: it learns, and writes a model, metrics and predictions."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from sentiment import FILLERS, QUICK, rows_of, sentence
from task_examples import settings_for, write_examples

from bertfast import BertForPreTraining, BertForSequenceClassification
from bertfast.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from bertfast.inference.predict import PredictSettings, predict
from bertfast.runtime.output_folder import OriginError
from bertfast.runtime.signals import RunStopped
from bertfast.tasks.pretrained import open_model
from bertfast.training.evaluate import EvaluateSettings, evaluate
from bertfast.training.finetune_settings import Hyperparameters
from bertfast.training.finetuning import FinetuneSettings, Finetuning, finetune
from bertfast.training.validation import evaluate_masked_lm

pytestmark = pytest.mark.slow


def test_fine_tuning_learns(tuned):
    _, results = tuned
    assert results["eval_accuracy"] >= 0.95
    assert results["eval_loss"] < 0.5
    assert results["best_step"] % 20 == 0
    assert results["epoch"] == 3


def test_fine_tuning_writes_a_model_metrics_and_predictions(tuned, files):
    folder, results = tuned
    assert json.loads((folder / "all_results.json").read_text()) == results
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validations = {entry["step"]: entry["eval_accuracy"] for entry in entries if "eval_accuracy" in entry}
    assert [*validations] == [20, 40, 60]
    assert validations[results["best_step"]] == max(validations.values()) == results["eval_accuracy"]
    assert [entry["step"] for entry in entries if "tokens_per_second" in entry] == [*range(10, 61, 10)]
    header, *rows = rows_of(folder / "predictions_validation.tsv")
    assert header == ["row", "id", "prediction", "bad", "good"]
    labels = [row[2] for row in rows_of(Path(files["validation_file"]))[1:]]
    right = [row[2] == label for row, label in zip(rows, labels, strict=True)]
    assert np.mean(right) == pytest.approx(results["eval_accuracy"])
    for row, (number, index, prediction, bad, good) in enumerate(rows, 1):
        assert (int(number), int(index), prediction) == (row, row - 1, "good" if float(good) > float(bad) else "bad")
        assert float(bad) + float(good) == pytest.approx(1, abs=1e-5)
    # The test file holds the same sentences, so the best model says the same of them.
    assert (folder / "predictions_test.tsv").read_text() == (folder / "predictions_validation.tsv").read_text()
    assert not [name for name in results if name.startswith("test_")]


def test_two_runs_with_the_same_seed_are_bitwise_identical(pretrained, files, tmp_path):
    weights = []
    for number, seed in enumerate([5, 5, 6]):
        folder = tmp_path / str(number)
        settings = FinetuneSettings.of(
            model_name_or_path=str(pretrained),
            train_file=files["train_file"],
            output_dir=str(folder),
            num_train_epochs=0.25,
            seed=seed,
            **QUICK,
        )
        finetune(settings)
        weights.append(BertForSequenceClassification.from_pretrained(folder).state_dict())
    same = [all(torch.equal(weights[0][key], other[key]) for key in other) for other in weights[1:]]
    assert same == [True, False]


def test_the_second_text_of_a_pair_has_its_own_token_type(pretrained, tmp_path):
    random_ = random.Random(0)
    opinions = ["bad", "good"]
    for name, rows in (("train", 640), ("validation", 60)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for _ in range(rows):
                label = random_.randrange(2)
                first, second = sentence(random_, random_.choice(opinions)), sentence(random_, opinions[label])
                file.write(json.dumps({"text": first, "reply": second, "stars": label}) + "\n")
    results = finetune(
        FinetuneSettings.of(
            model_name_or_path=str(pretrained),
            train_file=str(tmp_path / "train.jsonl"),
            validation_file=str(tmp_path / "validation.jsonl"),
            output_dir=str(tmp_path / "out"),
            text_pair_column="reply",
            label_column="stars",
            **QUICK,
        )
    )
    assert results["eval_accuracy"] >= 0.9


def test_regression(pretrained, tmp_path, capsys):
    random_ = random.Random(0)
    for name, rows in (("train", 480), ("validation", 60)):
        counts = [random_.randrange(4) for _ in range(rows)]
        lines = [f"{sentence(random_, *['good'] * count)}\t{count / 2}" for count in counts]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]))
    results = finetune(
        FinetuneSettings.of(
            model_name_or_path=str(pretrained),
            train_file=str(tmp_path / "train.tsv"),
            validation_file=str(tmp_path / "validation.tsv"),
            output_dir=str(tmp_path / "out"),
            num_train_epochs=6,
            **QUICK,
        )
    )
    assert results["eval_pearson"] >= 0.9
    header, *rows = rows_of(tmp_path / "out" / "predictions_validation.tsv")
    assert header == ["row", "prediction"]
    capsys.readouterr()
    where = {"model_name_or_path": str(tmp_path / "out"), "device": "cpu", "precision": "fp32"}
    predict(PredictSettings.of(**where, input_file=str(tmp_path / "validation.tsv")))
    scores = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    assert scores == pytest.approx([float(prediction) for _, prediction in rows], abs=1e-4)


def test_a_classifier_is_kept_for_the_same_labels_only(tuned, files, tmp_path):
    folder, _ = tuned
    three = tmp_path / "three.tsv"
    three.write_text("sentence\tlabel\n" + "good film\tgood\nbad film\tbad\nthe film\tnone\n")
    quick = QUICK | {"num_train_epochs": 0.01, "learning_rate": 0.0}
    # Not the order that the alphabet would give them.
    model = BertForSequenceClassification.from_pretrained(folder, id2label={0: "good", 1: "bad"})
    model.save_pretrained(tmp_path / "start")
    save_tokenizer(load_tokenizer(folder), tmp_path / "start")
    for train, out in ((files["train_file"], "same"), (str(three), "other")):
        start = {"model_name_or_path": str(tmp_path / "start"), "train_file": train}
        finetune(FinetuneSettings.of(**start, output_dir=str(tmp_path / out), **quick))
    same = BertForSequenceClassification.from_pretrained(tmp_path / "same")
    assert same.config.id2label == model.config.id2label
    assert torch.equal(same.classifier.weight, model.classifier.weight)
    other = BertForSequenceClassification.from_pretrained(tmp_path / "other")
    assert other.config.id2label == {0: "bad", 1: "good", 2: "none"}


def test_random_init_ignores_the_weights_of_the_checkpoint(pretrained, files, tmp_path):
    settings = {"model_name_or_path": str(pretrained), "train_file": files["train_file"], "num_train_epochs": 0.01}
    words = "bert.embeddings.word_embeddings.weight"
    weights = {}
    for random_init in (False, True):
        folder = tmp_path / str(random_init)
        finetune(
            FinetuneSettings.of(
                **settings, **QUICK | {"learning_rate": 0.0}, output_dir=str(folder), random_init=random_init
            )
        )
        weights[random_init] = BertForSequenceClassification.from_pretrained(folder).state_dict()[words]
    trained = BertForPreTraining.from_pretrained(pretrained).state_dict()[words]
    assert torch.equal(weights[False], trained)
    assert not torch.isclose(weights[True], trained).any(1).all()


def test_init_from_task_takes_the_encoder_but_not_the_head(pretrained, tuned, files, tmp_path):
    other, _ = tuned  # with the same labels: as --model-name-or-path, its head would be used too
    settings = {"model_name_or_path": str(pretrained), "train_file": files["train_file"], "num_train_epochs": 0.01}
    still = QUICK | {"learning_rate": 0.0}
    folder = tmp_path / "out"
    finetune(FinetuneSettings.of(**settings, **still, init_from_task=str(other), output_dir=str(folder)))
    model, start = map(BertForSequenceClassification.from_pretrained, (folder, other))
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in start.state_dict().items() if name.startswith("bert."))
    assert not torch.equal(model.classifier.weight, start.classifier.weight)

    foreign = tmp_path / "foreign"
    start.save_pretrained(foreign)
    save_tokenizer(train_tokenizer([" ".join(FILLERS)], 256), foreign)
    with pytest.raises(ValueError, match="foreign has another tokenizer than"):
        finetune(FinetuneSettings.of(**settings, **still, init_from_task=str(foreign), output_dir=str(tmp_path / "no")))


def test_the_best_model_is_kept_and_early_stopping_ends_the_run(tuned, files, tmp_path):
    # From a finished model, a rate that ruins it: the first validation is the best one.
    folder, _ = tuned
    settings = FinetuneSettings.of(
        model_name_or_path=str(folder),
        output_dir=str(tmp_path),
        **files,
        **QUICK | {"learning_rate": 0.3, "warmup_ratio": 0.9},
        eval_steps=2,
        metric_for_best_model="eval_loss",
        early_stopping_patience=2,
        num_train_epochs=2,
    )
    results = finetune(settings)
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {entry["step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry}
    assert losses[results["best_step"]] == min(losses.values()) == results["eval_loss"]
    assert max(losses) == results["best_step"] + 4 < 40
    # The test file holds the same sentences, and it is the best model that answers.
    assert (tmp_path / "predictions_test.tsv").read_text() == (tmp_path / "predictions_validation.tsv").read_text()
    where = {"model_name_or_path": str(tmp_path), "device": "cpu", "precision": "fp32"}
    evaluated = evaluate(EvaluateSettings.of(**where, validation_file=files["validation_file"]))
    assert evaluated["eval_loss"] == pytest.approx(results["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_the_best_model(number, pretrained, files, tmp_path):
    def interrupt(step: int) -> None:
        if step == 7:
            os.kill(os.getpid(), number)

    settings = FinetuneSettings.of(
        model_name_or_path=str(pretrained), output_dir=str(tmp_path), **files, **QUICK, eval_steps=3
    )
    with pytest.raises(
        RunStopped, match=rf"stopped after step 7 of 60, with a checkpoint: .*; the best model so far, .* in {tmp_path}"
    ) as stopped:
        finetune(settings, interrupt)
    assert stopped.value.status == 128 + number
    assert BertForSequenceClassification.from_pretrained(tmp_path).config.id2label == {0: "bad", 1: "good"}
    load_tokenizer(tmp_path)


def test_without_a_finite_gradient_the_run_stops_without_a_model(pretrained, files, tmp_path, monkeypatch):
    monkeypatch.setattr("bertfast.training.optimizer.get_total_norm", lambda _: torch.tensor(float("nan")))
    settings = FinetuneSettings.of(model_name_or_path=str(pretrained), output_dir=str(tmp_path), **files, **QUICK)
    with pytest.raises(RunStopped, match="10 steps in a row were skipped: a gradient is not finite; no step was taken"):
        finetune(settings)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_column": "sentense"}, "no column 'sentense', only .*; did you mean 'sentence'"),
        ({"label_column": "labels"}, "no column 'labels', only .*; did you mean 'label'"),
        ({"max_seq_length": 25}, "from 4 to 24 \\(the model's number of positions\\), got 25"),
        ({"metric_for_best_model": "f2"}, "one of accuracy, f1, matthews_correlation, loss in this task, got 'f2'"),
        ({"task": "regression"}, "line 2: the label '(good|bad)' is not a finite number"),
        ({"train_file": "missing.tsv"}, "--train-file missing.tsv: no such file"),
        ({"num_train_epochs": 0}, "--num-train-epochs must be more than 0 and at most 1000000, got 0"),
        ({"eval_steps": 0}, "--eval-steps must be at least 1, got 0"),
        ({"max_steps": 0}, "--max-steps must be at least 1, got 0"),
        ({"max_steps": 5, "num_train_epochs": 2.0}, "--num-train-epochs and --max-steps exclude each other"),
        ({"warmup_steps": 5, "warmup_ratio": 0.2}, "--warmup-ratio and --warmup-steps exclude each other"),
        ({"warmup_steps": 61}, "--warmup-steps 61 is more than the 60 steps of the run: lower it, or raise --num-tra"),
        (
            {"warmup_steps": 2, "max_steps": 1},
            "--warmup-steps 2 is more than the 1 step of the run: lower it, or raise --max-steps$",
        ),
        (
            {"lora_rank": 2, "lora_target_modules": ["query", "all-linear"]},
            "--lora-target-modules all-linear already includes every linear layer: leave out query, or give query with",
        ),
        (
            {"lr_scheduler_type": "constant", "warmup_ratio": 0.2},
            "--warmup-ratio would have no effect: --lr-scheduler-type constant has no warm-up",
        ),
        ({"lr_scheduler_type": "polynomial"}, "--lr-scheduler-type must be linear, cosine, constant, .*got 'polynom"),
        ({"layerwise_lr_decay": 1.5}, "--layerwise-lr-decay must be more than 0 and at most 1, got 1.5"),
        ({"label_smoothing_factor": 1.0}, "--label-smoothing-factor must be at least 0 and less than 1, got 1.0"),
        ({"max_train_samples": 0}, "--max-train-samples must be at least 1, got 0"),
        ({"test_file": None, "max_predict_samples": 3}, "--max-predict-samples would have no effect: there is no --te"),
        ({"validation_file": None, "max_eval_samples": 3}, "--max-eval-samples would have no effect: there is no --va"),
        ({"eval_tokens": 0}, "--eval-tokens must be at least 1, got 0"),
        ({"validation_file": None, "early_stopping_patience": 1}, "would have no effect: there is no --val"),
        (
            {"validation_file": None, "eval_steps": 1},
            "--eval-steps would have no effect: there is no --validation-file",
        ),
        ({"features_dir": "kept"}, "--features-dir would have no effect: this belongs to --strategy feature-based"),
        ({"bilstm": True, "strategy": "feature-based"}, "--bilstm would have no effect: --strategy feature-based has"),
        ({"doc_stride": 8}, "--doc-stride would have no effect: the task is sequence-classification"),
        ({"random_init": True, "init_from_task": "tuned"}, "exclude each other"),
        ({"init_from_task": "./nowhere"}, "nowhere is not a folder"),
    ],
)
def test_invalid_settings_are_refused_before_any_work(pretrained, files, tmp_path, change, message):
    settings = {"model_name_or_path": str(pretrained), "output_dir": str(tmp_path / "out")} | files | QUICK | change
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        finetune(FinetuneSettings.of(**settings))
    assert not (tmp_path / "out").exists()


def test_an_unknown_validation_label_is_refused(pretrained, files, tmp_path):
    odd = tmp_path / "odd.tsv"
    odd.write_text("sentence\tlabel\ngood film\tgood\nso so\tneutral\n")
    settings = {"model_name_or_path": str(pretrained), "output_dir": str(tmp_path / "out")} | files | QUICK
    with pytest.raises(ValueError, match=r"odd\.tsv, line 3: unknown label 'neutral'; known labels: bad, good"):
        finetune(FinetuneSettings.of(**settings | {"validation_file": str(odd)}))


def test_a_folder_with_a_model_is_not_overwritten(tuned, pretrained, files):
    folder, _ = tuned
    before = (folder / "model.safetensors").read_bytes()
    settings = FinetuneSettings.of(model_name_or_path=str(pretrained), output_dir=str(folder), **files, **QUICK)
    with pytest.raises(OriginError, match="has the results of a run with the same inputs and settings"):
        finetune(settings)
    with pytest.raises(OriginError, match=r"--learning-rate was 0\.003 and is 0\.1; --seed was 42 and is 3: choose"):
        finetune(settings.replace(learning_rate=0.1, seed=3))
    for overwrite in (False, True):  # the model to start from
        with pytest.raises(ValueError, match=r"--model-name-or-path reads .*config\.json, which would be replaced"):
            finetune(settings.replace(model_name_or_path=str(folder), overwrite_output_dir=overwrite))
    assert (folder / "model.safetensors").read_bytes() == before


def test_old_results_stay_until_model_and_data_have_been_read(pretrained, files, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("config.json", "predictions_old.tsv", "notes.txt"):
        (tmp_path / "out" / name).write_text("old")
    settings = {"model_name_or_path": str(pretrained), "output_dir": str(tmp_path / "out")} | files | QUICK
    with pytest.raises(OriginError, match=r"contents without a record of their inputs and settings \(config\.json\)"):
        finetune(FinetuneSettings.of(**settings))
    bad = tmp_path / "bad.tsv"
    bad.write_text("sentence\tlabel\nno label\n")
    settings["overwrite_output_dir"] = True
    with pytest.raises(ValueError, match=r"bad\.tsv, line 2"):
        finetune(FinetuneSettings.of(**settings | {"train_file": str(bad)}))
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    finetune(FinetuneSettings.of(**settings, num_train_epochs=0.1))
    assert not (tmp_path / "out" / "predictions_old.tsv").exists()
    assert (tmp_path / "out" / "notes.txt").read_text() == "old"


def test_unsuitable_checkpoints_are_refused(pretrained, files, tmp_path):
    def attempt(folder: Path):
        return finetune(
            FinetuneSettings.of(model_name_or_path=str(folder), output_dir=str(tmp_path / "out"), **files, **QUICK)
        )

    bare = tmp_path / "bare"
    BertForPreTraining.from_pretrained(pretrained).save_pretrained(bare)
    with pytest.raises(FileNotFoundError, match=r"holds neither a tokenizer\.json nor a vocab\.txt"):
        attempt(bare)
    save_tokenizer(train_tokenizer([" ".join(FILLERS)], 320), bare)
    with pytest.raises(
        ValueError, match="has 320 tokens, but the model's vocab_size is 256: they do not belong together"
    ):
        attempt(bare)
    save_tokenizer(load_tokenizer(pretrained), bare)
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(ValueError, match=r" has shape \[.*32.*\], but config.json implies \[.*64.*\]"):
        attempt(bare)
    with pytest.raises(ValueError, match="was not trained as a BertForSequenceClassification"):
        predict(PredictSettings.of(model_name_or_path=str(pretrained)))


def test_a_model_that_cannot_run_packed_is_refused_with_the_report(pretrained, tmp_path):
    """Before the first step, and with a sentence on each part that is left alone."""
    folder = tmp_path / "model"
    shutil.copytree(pretrained, folder)
    config = json.loads((folder / "config.json").read_text()) | {"hidden_act": "mish"}
    (folder / "config.json").write_text(json.dumps(config))
    file = write_examples(tmp_path, "sequence-classification", 8, seed=0)
    with pytest.raises(ValueError, match=r"cannot run on packed batches:\n[^$]*encoder.layer.0: its activation is"):
        Finetuning(settings_for("sequence-classification", folder, file, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_precision_without_kernels_is_refused(pretrained, tmp_path):
    """By fine-tuning, inference and validation, with heads of 48 columns."""
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(pretrained, folder)
    config = BertForPreTraining.config_class.from_pretrained(folder, hidden_size=96)
    BertForPreTraining(config).save_pretrained(folder)
    file = write_examples(tmp_path, "sequence-classification", 8, seed=0)
    refused = pytest.raises(ValueError, match=r"with --precision bf16, no fast kernels for .*: pass --precision fp32$")
    with refused:
        Finetuning(settings_for("sequence-classification", folder, file, out, precision="bf16"))
    with refused:
        open_model(BertForPreTraining, str(folder), False, precision="bf16")
    with refused:
        evaluate_masked_lm(str(folder), "", max_seq_length=None, tokens_per_batch=64, precision="bf16", device="cpu")
    open_model(BertForPreTraining, str(folder), False, precision="fp32")


def test_less_than_one_step_is_said(caplog):
    for epochs, steps in ((0.5, 10), (0.01, 1)):
        assert not caplog.messages
        assert Hyperparameters(num_train_epochs=epochs).steps(20) == steps
        Hyperparameters(num_train_epochs=epochs).warn_if_less_than_one_step(20)
    assert "0.01 epochs are less than one step, of which an epoch has 20" in caplog.text
