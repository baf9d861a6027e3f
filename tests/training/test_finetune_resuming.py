"""Interrupted, killed and damaged fine-tuning runs resume, bitwise identical to an uninterrupted run."""

import random
import signal
import sys
from pathlib import Path

import pytest
from runs import assert_same_finetuning, entries, exit_code, stopped_at, terminated_in_training
from sentiment import QUICK
from task_examples import settings_for, write_examples
from text_pairs import write_pairs

from bertfast import BertForSequenceClassification
from bertfast.runtime.output_folder import OriginError
from bertfast.runtime.signals import RunStopped
from bertfast.training.checkpoint import checkpoints
from bertfast.training.finetuning import FinetuneSettings, Finetuning, finetune
from bertfast.training.sweep import SweepSettings, sweep

pytestmark = pytest.mark.slow

TASKS = {
    "sequence-classification": {"class_weights": "balanced", "gradient_accumulation_steps": 2, "eval_steps": 4},
    "multiple-choice": {
        "validation_file": None,
        "optimizer": "muon",
        "layerwise_lr_decay": 0.8,
        "lr_scheduler_type": "cosine",
        "label_smoothing_factor": 0.1,
    },
    "question-answering": {"eval_steps": 3, "metric_for_best_model": "loss", "early_stopping_patience": 6},
    "token-classification": {"bilstm": True},
    "embedding": {"tokens_per_batch": 60, "layerwise_lr_decay": 0.9},
    "feature-based": {"strategy": "feature-based", "lstm_size": 8},
}


def settings_of_run(kind: str, model: Path, data: Path, folder: Path, **changes) -> FinetuneSettings:
    task = "token-classification" if kind == "feature-based" else kind
    data.mkdir(exist_ok=True)
    is_embedding = task == "embedding"
    file = write_pairs(data / "a.tsv", "pairs", 90) if is_embedding else write_examples(data, task, 90, seed=0)
    options = {"per_device_train_batch_size": 8, "num_train_epochs": 2, "dropout": 0.2, "validation_file": str(file)}
    return settings_for(task, model, file, folder, **options | TASKS[kind] | changes)


@pytest.mark.parametrize("kind", TASKS)
def test_a_resumed_run_is_bitwise_identical_to_an_uninterrupted_one(kind, pretrained, tmp_path):
    settings = settings_of_run(kind, pretrained, tmp_path / "data", tmp_path / "whole")
    steps = Finetuning(settings).steps
    finetune(settings)
    settings = settings.replace(output_dir=str(tmp_path / "cut"))
    for step in (3, steps // 2, steps):  # a validation may be due, and at the end it is
        with pytest.raises(RunStopped, match=rf"stopped after step {step} of {steps}, with a checkpoint: the same"):
            finetune(settings, stopped_at(step))
        settings = settings.replace(resume=True)
    finetune(settings)
    assert_same_finetuning(tmp_path / "whole", tmp_path / "cut")


def test_a_run_killed_at_ten_random_moments_ends_bitwise_identical(pretrained, files, tmp_path):
    """While it trains, validates, saves models and writes checkpoints."""
    run = {"model_name_or_path": str(pretrained), "num_train_epochs": 5, "eval_steps": 7, "save_steps": 2}
    settings = FinetuneSettings.of(output_dir=str(tmp_path / "whole"), **files, **QUICK, **run)
    assert exit_code(finetune, settings, None) == 0
    settings = settings.replace(output_dir=str(tmp_path / "killed"), resume=True)
    moments = random.Random(0)
    for _ in range(10):  # for at most 4 seconds, and the run takes at least 5
        assert exit_code(finetune, settings, moments.uniform(0, 0.4)) == -signal.SIGKILL
    assert exit_code(finetune, settings, None) == 0
    assert_same_finetuning(tmp_path / "whole", tmp_path / "killed")


def test_the_best_model_of_the_checkpoint_replaces_a_later_one(pretrained, files, tmp_path):
    """Of a step after the checkpoint, which may not be the best one when it is repeated."""
    values = {"model_name_or_path": str(pretrained), "eval_steps": 20, "save_steps": 25} | files | QUICK
    settings = FinetuneSettings.of(output_dir=str(tmp_path / "run"), **values)

    def copy_and_fail(step: int) -> None:
        if step == 25:
            best.append((tmp_path / "run" / "model.safetensors").read_bytes())
        if step == 41:
            raise KeyboardInterrupt

    best: list[bytes] = []
    with pytest.raises(KeyboardInterrupt):
        finetune(settings, copy_and_fail)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != best[0]
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert {path.name for path in (saved / "best").iterdir()} == {
        "config.json",
        "model.safetensors",
        "predictions_validation.tsv",
        "report_validation.json",
    }
    with pytest.raises(RunStopped, match="the best model so far, that of step 20, is in"):
        finetune(settings.replace(resume=True), stopped_at(26))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == best[0]


def test_without_a_checkpoint_the_run_starts_again(pretrained, files, tmp_path, caplog):
    settings = FinetuneSettings.of(
        model_name_or_path=str(pretrained), output_dir=str(tmp_path), eval_steps=2, resume=True, **files, **QUICK
    )

    def fail(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(settings, fail)
    with pytest.raises(OriginError, match="has the results of a run with the same inputs and settings"):
        finetune(settings.replace(resume=False))
    with pytest.raises(RunStopped, match="stopped after step 1 of 60, with a checkpoint: the same command continues"):
        finetune(settings, stopped_at(1))
    assert f"there is no checkpoint in {tmp_path}: starting from step 0" in caplog.text
    assert {entry["step"] for entry in entries(tmp_path)} == set()
    assert (tmp_path / "model.safetensors").exists()  # that of step 1, as there is no better one yet
    with pytest.raises(ValueError, match=rf"{tmp_path} already holds a run: add --resume to continue it, choose"):
        finetune(settings.replace(resume=False))


def test_changed_settings_are_refused_with_old_and_new_values(pretrained, files, tmp_path):
    settings = FinetuneSettings.of(model_name_or_path=str(pretrained), output_dir=str(tmp_path), **files, **QUICK)
    with pytest.raises(RunStopped):
        finetune(settings, stopped_at(2))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    changed = settings.replace(resume=True, learning_rate=0.1, train_file=files["validation_file"])
    message = (
        r"--learning-rate was 0\.003 and is 0\.1; --train-file was .*train\.tsv .* and is .*validation\.tsv .*: repeat "
        r"the command of that run with --resume added, or choose another --output-dir$"
    )
    with pytest.raises(ValueError, match=message.replace("--learning-rate was 0\\.003 and is 0\\.1; ", "")) as error:
        finetune(changed)
    assert "--learning-rate was 0.003 and is 0.1" in str(error.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="--overwrite-output-dir removes the run that --resume needs"):
        settings.replace(resume=True, overwrite_output_dir=True)
    results = finetune(settings.replace(resume=True, save_steps=7, logging_steps=3, save_total_limit=1))
    assert results["epoch"] == 3


def test_a_finished_run_is_not_repeated(pretrained, files, tmp_path, caplog):
    settings = FinetuneSettings.of(
        model_name_or_path=str(pretrained), output_dir=str(tmp_path), num_train_epochs=0.2, **files, **QUICK
    )
    results = finetune(settings)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("[!.o]*")}
    caplog.set_level("INFO", "bertfast")
    assert finetune(settings.replace(resume=True), stopped_at(1)) == results
    assert f"the run in {tmp_path} is finished" in caplog.text
    assert "there is no checkpoint" not in caplog.text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("[!.o]*")} == before
    (tmp_path / "all_results.json").write_text("{")
    again = finetune(settings.replace(resume=True))
    assert "the run is repeated: " in caplog.text
    assert again["eval_loss"] == results["eval_loss"]


def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(pretrained, files, tmp_path, caplog):
    settings = FinetuneSettings.of(
        model_name_or_path=str(pretrained), output_dir=str(tmp_path), save_steps=5, eval_steps=4, **files, **QUICK
    )
    with pytest.raises(RunStopped):
        finetune(settings, stopped_at(12))
    older, newest = checkpoints(tmp_path / "checkpoints")
    weights = newest / "best" / "model.safetensors"
    shortened = weights.read_bytes()[:-1]
    weights.unlink()  # older checkpoints may link to the same file
    weights.write_bytes(shortened)
    with pytest.raises(RunStopped, match="stopped after step 11 of 60"):
        finetune(settings.replace(resume=True), stopped_at(11))
    assert f"{newest} is damaged (best/model.safetensors): continuing from {older.name}\n" in caplog.text
    for saved in checkpoints(tmp_path / "checkpoints"):
        (saved / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged: start again with another --output-dir"):
        finetune(settings.replace(resume=True))


@pytest.mark.parametrize(("flags", "status"), [([], 143), (["--sigterm-exit-code", "0"], 0)])
def test_the_exit_status_tells_that_a_signal_ended_the_program(flags, status, pretrained, files, tmp_path):
    command = [str(Path(sys.executable).with_name("bertfast")), "finetune", "--output-dir", str(tmp_path / "run")]
    command += ["--model-name-or-path", str(pretrained), "--train-file", files["train_file"], "--device", "cpu"]
    command += ["--num-train-epochs", "10000", "--logging-steps", "1", *flags]
    printed, exit_status = terminated_in_training(command, tmp_path / "run")
    assert "with a checkpoint: the same command with --resume continues the run" in printed
    assert exit_status == status
    assert len(checkpoints(tmp_path / "run" / "checkpoints")) == 1
    BertForSequenceClassification.from_pretrained(tmp_path / "run")


def test_a_sweep_continues_its_interrupted_run(pretrained, tmp_path, monkeypatch, capsys):
    file = str(write_examples(tmp_path, "sequence-classification", 48, seed=0))
    values = {"model_name_or_path": str(pretrained), "train_file": file, "validation_file": file, "device": "cpu"}
    grid = {"learning_rates": [1e-2], "batch_sizes": [8], "epochs": [1.0], "seeds": [1, 2], "precision": "fp32"}
    settings = SweepSettings.of(output_dir=str(tmp_path / "whole"), **values, **grid)
    expected = sweep(settings)
    train_step, steps = Finetuning.train_step, []

    def stop_in_the_second_run(self, rows):
        train_step(self, rows)
        steps.append(self.step)
        if len(steps) == 9:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Finetuning, "train_step", stop_in_the_second_run)
    settings = settings.replace(output_dir=str(tmp_path / "cut"))
    with pytest.raises(
        RunStopped, match="stopped after step 3 of 6, with a checkpoint: run the same command again to con"
    ):
        sweep(settings)
    assert sweep(settings)["combinations"] == expected["combinations"]
    assert steps == [*range(1, 7), *range(1, 4), *range(4, 7)]
