"""Runs and models whose losses or outputs are not finite end with an error, not with results."""

import json
from pathlib import Path

import pytest
import torch
from runs import entries
from runs import settings_for as pretrain_settings_for
from sentiment import QUICK
from task_examples import settings_for, write_examples

from bertfast import BertForPreTraining, BertForSequenceClassification
from bertfast.cli.main import main
from bertfast.data.tokenizer import load_tokenizer, save_tokenizer
from bertfast.encoder import pretraining_loss
from bertfast.runtime.precision import NotFiniteError
from bertfast.runtime.signals import RunStopped
from bertfast.training import finetuning
from bertfast.training import step as train_step
from bertfast.training.finetuning import FinetuneSettings, finetune
from bertfast.training.pretraining import pretrain
from bertfast.training.sweep import SweepSettings, sweep
from bertfast.training.validation import evaluate_masked_lm

pytestmark = pytest.mark.slow

TOO_FEW = {"per_device_train_batch_size": 16, "num_train_epochs": 1}


@pytest.fixture
def overflowing(pretrained, tmp_path) -> Path:
    """A masked LM whose weights are finite, but not what it computes."""
    model = BertForPreTraining.from_pretrained(pretrained)
    with torch.no_grad():
        model.bert.encoder.layer[-1].output.LayerNorm.weight.fill_(3e38)
        model.bert.encoder.layer[-1].output.LayerNorm.bias.fill_(3e38)
    model.save_pretrained(tmp_path / "overflowing")
    save_tokenizer(load_tokenizer(pretrained), tmp_path / "overflowing")
    return tmp_path / "overflowing"


def settings_of_three_steps(model: Path, folder: Path, **changes) -> FinetuneSettings:
    file = write_examples(folder, "sequence-classification", 48, seed=0)
    values = TOO_FEW | changes
    return settings_for("sequence-classification", model, file, folder / "out", **values)


@pytest.mark.parametrize("validated", [False, True])
def test_fine_tuning_without_a_finite_loss_ends_with_an_error_and_no_model(
    validated, pretrained, tmp_path, monkeypatch
):
    monkeypatch.setattr("bertfast.training.optimizer.get_total_norm", lambda _: torch.tensor(float("nan")))
    settings = settings_of_three_steps(pretrained, tmp_path)
    if validated:
        settings = settings.replace(validation_file=settings.train_file)
    expected = (
        r"all 3 steps so far were skipped, from step 1 on: a gradient is not finite; .*--precision fp32; there is no"
    )
    with pytest.raises(RunStopped, match=expected):
        finetune(settings)
    assert not {"all_results.json", "config.json"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert all("loss" not in entry for entry in entries(tmp_path / "out"))


def test_fine_tuning_that_diverges_in_its_last_steps_ends_with_an_error(pretrained, tmp_path, monkeypatch):
    norms = iter([1.0, float("nan"), float("nan")])
    monkeypatch.setattr("bertfast.training.optimizer.get_total_norm", lambda _: torch.tensor(next(norms)))
    with pytest.raises(
        RunStopped, match=r"all steps from step 2 on were skipped: .*; lower --learning-rate; there is no"
    ):
        finetune(settings_of_three_steps(pretrained, tmp_path))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_step_that_is_skipped_is_said_and_counted(pretrained, tmp_path, monkeypatch, caplog):
    norms = iter([1.0, float("nan"), 1.0])
    monkeypatch.setattr("bertfast.training.optimizer.get_total_norm", lambda _: torch.tensor(next(norms)))
    results = finetune(settings_of_three_steps(pretrained, tmp_path))
    assert results["skipped_steps"] == 1
    assert "step 2 was skipped: a gradient is not finite" in caplog.text
    assert results["train_loss"] > 0


@pytest.mark.parametrize(("given", "flag"), [({}, "--warmup-ratio"), ({"warmup_steps": 1}, "--warmup-steps")])
def test_a_run_whose_only_step_trains_nothing_says_so(given, flag, pretrained, tmp_path, caplog):
    one = {"num_train_epochs": 1, "per_device_train_batch_size": 48}
    finetune(settings_of_three_steps(pretrained, tmp_path, **one, **given))
    assert f"the only step has a learning rate of 0: for more, pass {flag} 0 or more epochs" in caplog.text


def test_outputs_that_are_not_finite_are_no_validation_results(pretrained, tmp_path):
    settings = settings_of_three_steps(pretrained, tmp_path, learning_rate=1e38)
    settings = settings.replace(validation_file=settings.train_file)
    with pytest.raises(RunStopped, match=r"step \d.*lower --learning-rate; there is no model"):
        finetune(settings)
    assert not (tmp_path / "out" / "all_results.json").exists()
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text()


def test_a_model_whose_outputs_are_not_finite_is_not_saved_without_validation(pretrained, tmp_path, monkeypatch):
    settings = settings_of_three_steps(pretrained, tmp_path)
    step = finetuning.Finetuning.train_step

    def overflow_in_the_last(self, rows):
        step(self, rows)
        if self.step == self.steps:
            for parameter in self.model.parameters():
                parameter.data.fill_(1e30)

    monkeypatch.setattr(finetuning.Finetuning, "train_step", overflow_in_the_last)
    with pytest.raises(
        RunStopped, match="outputs are not finite on the training data; lower --learning-rate; there is no"
    ):
        finetune(settings)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_pre_training_without_a_finite_loss_ends_with_an_error_and_no_model(data, tmp_path, monkeypatch, caplog):
    def poisoned(*arguments, **options):
        loss = pretraining_loss(*arguments, **options)
        loss.masked_lm.data.fill_(torch.nan)
        return loss

    monkeypatch.setattr(train_step, "pretraining_loss", poisoned)
    caplog.set_level("INFO", "bertfast")
    with pytest.raises(RunStopped, match=r"all 5 steps were skipped, from step 1 on: the loss is nan; .*there is no"):
        pretrain(pretrain_settings_for(tmp_path, data, max_steps=5, save_steps=100))
    assert "skipped (1 so far)" in caplog.text
    assert "--replay" not in caplog.text  # there is no checkpoint from which a step could be computed again
    assert not (tmp_path / "config.json").exists()


def test_a_validation_loss_that_is_not_finite_ends_pre_training(data, tmp_path):
    changes = {"max_steps": 3, "learning_rate": 1e38, "optimizer": "adamw", "save_steps": 100}
    with pytest.raises(
        RunStopped, match=r"after step 3, the model's outputs are not finite on the validation text: lower"
    ):
        pretrain(pretrain_settings_for(tmp_path, data, **changes))
    assert not (tmp_path / "config.json").exists()
    assert "validation_loss" not in (tmp_path / "metrics.jsonl").read_text()


def test_models_whose_outputs_are_not_finite_are_refused_by_every_command(overflowing, tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("the film was good\nthe plot was bad\n")
    model = ["--model-name-or-path", str(overflowing), "--device", "cpu", "--precision", "fp32"]
    classifier = tmp_path / "classifier"
    BertForSequenceClassification.from_pretrained(overflowing).save_pretrained(classifier)
    save_tokenizer(load_tokenizer(overflowing), classifier)
    (tmp_path / "a.tsv").write_text("text\tlabel\nthe film was good\tLABEL_0\nthe plot\tLABEL_1\n")
    tuned, table = ["--model-name-or-path", str(classifier), *model[2:]], str(tmp_path / "a.tsv")
    commands = [
        ["evaluate", *model, "--objective", "mlm", "--validation-file", str(text), "--output-dir", str(tmp_path / "e")],
        ["evaluate", *tuned, "--validation-file", table, "--output-dir", str(tmp_path / "e")],
        ["embed", *model, "--input-file", str(text), "--output-dir", str(tmp_path / "v")],
        ["predict", *tuned, "--input-file", table],
        ["fill-mask", str(overflowing), "the [MASK] was good"],
    ]
    for command in commands:
        assert main(command) == 1, command
        out, err = capsys.readouterr()
        assert "are not finite: its weights are too large" in err.strip().splitlines()[-1], command
        assert "nan" not in out.lower()
    assert not [*tmp_path.glob("[ev]/*results*"), *tmp_path.glob("[ev]/part-*")]


def test_the_error_of_a_model_names_it(overflowing, tmp_path):
    (tmp_path / "a.txt").write_text("the film was good\n")
    options = {"max_seq_length": None, "tokens_per_batch": 64, "precision": "fp32", "device": "cpu"}
    with pytest.raises(NotFiniteError, match=f"the outputs of {overflowing} are not finite"):
        evaluate_masked_lm(str(overflowing), str(tmp_path / "a.txt"), **options)
    with pytest.raises(ValueError, match="--eval-tokens must be at least --max-seq-length 24, got 8"):
        evaluate_masked_lm(str(overflowing), str(tmp_path / "a.txt"), **options | {"tokens_per_batch": 8})


def test_the_spread_of_one_seed_is_null(pretrained, tmp_path):
    file = str(write_examples(tmp_path, "sequence-classification", 32, seed=0))
    grid = {"learning_rates": [1e-2], "batch_sizes": [16], "epochs": [1.0], "seeds": [1]}
    shared = {"device": QUICK["device"], "precision": QUICK["precision"], "output_dir": str(tmp_path / "out")}
    files = {"model_name_or_path": str(pretrained), "train_file": file, "validation_file": file}
    sweep(SweepSettings.of(**files, **shared, **grid))
    text = (tmp_path / "out" / "sweep.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["combinations"][0]["spread"] is None
