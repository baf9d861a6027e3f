"""Options of fine-tuning, as in run_glue and its siblings: length, schedule, optimizers, loss, parts of the data."""

import json

import pytest
import torch
from sentiment import QUICK, rows_of
from task_examples import padded, settings_for, write_examples
from text_pairs import write_pairs
from transformers.trainer_pt_utils import LabelSmoother

from bertfast.training.finetuning import FinetuneSettings, Finetuning, finetune

pytestmark = pytest.mark.slow


def test_max_steps_sets_the_length_of_the_run(pretrained, files, tmp_path):
    values = {"model_name_or_path": str(pretrained), "train_file": files["train_file"], "output_dir": str(tmp_path)}
    results = finetune(FinetuneSettings.of(**values, **QUICK, max_steps=23, logging_steps=1))
    assert results["epoch"] == 23 / 20
    assert results["best_step"] == 23
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [*range(1, 24)]


def test_the_schedule_and_the_warm_up_steps_set_the_learning_rate(pretrained, files, tmp_path):
    values = {"model_name_or_path": str(pretrained), "train_file": files["train_file"], "output_dir": str(tmp_path)}
    settings = FinetuneSettings.of(**values, **QUICK | {"learning_rate": 1.0}, max_steps=10, warmup_steps=4)
    rates = {}
    for name in ("linear", "constant_with_warmup", "cosine"):
        run, rates[name] = Finetuning(settings.replace(lr_scheduler_type=name)), []
        for run.progress.step in range(10):
            rates[name].append(run.learning_rate)
        assert rates[name][:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert rates["linear"][5:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert rates["constant_with_warmup"][5:] == [1] * 5
    assert rates["cosine"][7] == pytest.approx(0.5)
    run = Finetuning(settings.replace(lr_scheduler_type="constant", warmup_steps=None))
    assert run.learning_rate == 1


KINDS = ["sequence-classification", "token-classification", "question-answering", "multiple-choice"]


@pytest.mark.parametrize("task", KINDS)
def test_only_the_first_examples_are_used(task, pretrained, tmp_path):
    file = write_examples(tmp_path, task, 40, seed=0)
    limits = {"max_train_samples": 16, "max_eval_samples": 7, "max_predict_samples": 100}
    files = {"validation_file": str(file), "test_file": str(file), "num_train_epochs": 1}
    settings = settings_for(task, pretrained, file, tmp_path / "out", **limits, **files)
    run = Finetuning(settings)
    assert {split: len(examples) for split, examples in run.examples.items()} == {
        "train": 16,
        "validation": 7,
        "test": 40,
    }
    every = Finetuning(settings.replace(max_train_samples=None))
    end = run.features["train"].cu_seqlens[-1]
    assert run.features["train"].token_ids.tolist() == every.features["train"].token_ids[:end].tolist()
    results = run.run(lambda step: None)
    assert results["train_samples"] == 16
    if task == "sequence-classification":
        assert [row[0] for row in rows_of(tmp_path / "out" / "predictions_validation.tsv")[1:]] == list("1234567")


@pytest.mark.parametrize("form", ["pairs", "scored"])
def test_only_the_first_pairs_of_texts_are_used(form, pretrained, tmp_path):
    file = write_pairs(tmp_path / "a.tsv", form, 40)
    settings = settings_for("embedding", pretrained, file, tmp_path / "out", max_train_samples=16, max_steps=1)
    every, limited = (Finetuning(changed) for changed in (settings.replace(max_train_samples=None), settings))
    end = limited.features["train"].cu_seqlens[-1]
    assert limited.features["train"].token_ids.tolist() == every.features["train"].token_ids[:end].tolist()
    assert limited.run(lambda step: None)["train_samples"] == 16


def test_labels_are_those_of_all_training_data(pretrained, tmp_path):
    file = tmp_path / "a.tsv"
    file.write_text("sentence\tlabel\n" + "good film\tgood\n" * 8 + "bad film\tbad\n" * 8)
    settings = settings_for("sequence-classification", pretrained, file, tmp_path / "out", max_train_samples=8)
    assert Finetuning(settings).config.id2label == {0: "bad", 1: "good"}


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "multiple-choice"])
def test_smoothed_losses_equal_those_of_transformers(task, pretrained, tmp_path):
    """In one pass or in several; gradients follow from the loss by autograd."""
    file = write_examples(tmp_path, task, 16, seed=0)
    settings = settings_for(task, pretrained, file, tmp_path / "out", label_smoothing_factor=0.2)
    for budget in (10**6, 30):
        run = Finetuning(settings.replace(tokens_per_batch=budget))
        rows = next(run.rows_of_steps())
        batch = padded(run.features["train"], rows)
        labels = batch["labels"]
        logits = run.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        expected = LabelSmoother(epsilon=0.2)({"logits": logits}, labels).item()
        run.train_step(rows)
        assert run.results.pending[0][0].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("task", ["question-answering", "regression", "multi-label"])
def test_label_smoothing_is_refused_without_classes(task, pretrained, tmp_path):
    file = write_examples(tmp_path, task, 16, seed=0)
    with pytest.raises(ValueError, match="--label-smoothing-factor requires a task in which every example or word has"):
        Finetuning(settings_for(task, pretrained, file, tmp_path / "out", label_smoothing_factor=0.1))


@pytest.mark.parametrize("form", ["pairs", "scored", "labelled"])
def test_label_smoothing_is_refused_for_embeddings(form, pretrained, tmp_path):
    file = write_pairs(tmp_path / "a.tsv", form, 16)
    with pytest.raises(ValueError, match="--label-smoothing-factor requires a task in which every example or word has"):
        Finetuning(settings_for("embedding", pretrained, file, tmp_path / "out", label_smoothing_factor=0.1))


def test_layerwise_decay_is_refused_without_training_of_the_layers(pretrained, tmp_path):
    file, options = write_examples(tmp_path, "token-classification", 16, seed=0), {"strategy": "feature-based"}
    with pytest.raises(
        ValueError, match="--layerwise-lr-decay would have no effect: --strategy feature-based trains no"
    ):
        settings_for("token-classification", pretrained, file, tmp_path / "out", layerwise_lr_decay=0.9, **options)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon"])
def test_layerwise_decay_keeps_lower_layers_closer_to_the_initial_model(optimizer, pretrained, tmp_path):
    file = write_examples(tmp_path, "sequence-classification", 16, seed=0)
    decay = {"optimizer": optimizer, "layerwise_lr_decay": 1e-12, "warmup_ratio": 0.0}
    run = Finetuning(settings_for("sequence-classification", pretrained, file, tmp_path / "out", **decay))
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    run.train_step(next(run.rows_of_steps()))
    for name, parameter in run.model.named_parameters():
        moved = not torch.allclose(parameter, before[name], rtol=0, atol=1e-9)
        assert moved == name.startswith(("classifier", "bert.pooler")), name
