"""TensorBoard and Weights & Biases writers of the metrics log."""

import shutil
import sys
from types import SimpleNamespace

import pytest
from runs import entries, losses, settings_for, stopped_at
from sentiment import QUICK

from bertfast.runtime.signals import RunStopped
from bertfast.training.finetuning import FinetuneSettings, finetune
from bertfast.training.metrics_log import tensorboard, wandb
from bertfast.training.pretraining import pretrain
from bertfast.training.schedule import schedule

SHORT = {"max_steps": 4, "eval_batches": 1}


def test_tensorboard_reads_the_metrics(data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pretrain(settings_for(tmp_path, data, **SHORT, tensorboard=True))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    curve = events.Scalars("masked_lm_loss")
    assert [event.step for event in curve] == [1, 2, 3, 4]
    assert [event.value for event in curve] == pytest.approx(losses(tmp_path))
    assert events.Scalars("validation_loss")[0].step == 4


def test_tensorboard_reads_the_metrics_of_fine_tuning(pretrained, files, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {"logging_steps": 10, "max_steps": 20, "tensorboard": True, "output_dir": str(tmp_path)}
    finetune(FinetuneSettings.of(model_name_or_path=str(pretrained), **files, **QUICK, **options))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [entry for entry in entries(tmp_path) if "loss" in entry]
    assert [event.step for event in events.Scalars("loss")] == [10, 20]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([entry["loss"] for entry in logged])
    rates = [schedule("linear", step / 20, 0.1) * QUICK["learning_rate"] for step in (9, 19)]
    assert [event.value for event in events.Scalars("learning_rate")] == pytest.approx(rates)
    assert [event.step for event in events.Scalars("eval_accuracy")] == [20]


@pytest.mark.parametrize(("steps", "expected"), [(3, [3]), (5, [5]), (7, [5, 7])])
def test_the_last_step_of_fine_tuning_is_logged(steps, expected, pretrained, files, tmp_path):
    options = {"logging_steps": 5, "max_steps": steps, "output_dir": str(tmp_path)}
    finetune(FinetuneSettings.of(model_name_or_path=str(pretrained), **files, **QUICK, **options))
    assert [entry["step"] for entry in entries(tmp_path) if "loss" in entry] == expected


def test_the_last_step_of_a_run_that_stops_early_is_logged(pretrained, files, tmp_path):
    options = {"logging_steps": 7, "eval_steps": 5, "early_stopping_patience": 1, "output_dir": str(tmp_path)}
    values = QUICK | {"learning_rate": 0.0}  # no validation is better than the first
    finetune(FinetuneSettings.of(model_name_or_path=str(pretrained), **files, **values, **options))
    assert [entry["step"] for entry in entries(tmp_path) if "loss" in entry] == [7, 10]


@pytest.mark.parametrize(("steps", "expected"), [(3, [3]), (5, [5]), (7, [5, 7])])
def test_the_last_step_of_pre_training_is_logged(steps, expected, data, tmp_path):
    pretrain(settings_for(tmp_path, data, eval_batches=1, max_steps=steps, logging_steps=5))
    assert [entry["step"] for entry in entries(tmp_path) if "masked_lm_loss" in entry] == expected


def test_the_last_step_of_a_run_in_minutes_is_logged(data, tmp_path):
    pretrain(settings_for(tmp_path, data, eval_batches=1, max_steps=0, minutes=0.002, logging_steps=10**6))
    (logged,) = (entry["step"] for entry in entries(tmp_path) if "masked_lm_loss" in entry)
    assert logged == entries(tmp_path)[-1]["step"]


def test_a_step_after_which_a_run_is_stopped_is_not_logged(data, pretrained, files, tmp_path):
    """A run that continues has the metrics of one that was never stopped."""
    options = {"logging_steps": 5, "max_steps": 7}
    with pytest.raises(RunStopped):
        pretrain(settings_for(tmp_path / "a", data, eval_batches=1, **options), stopped_at(3))
    settings = FinetuneSettings.of(
        model_name_or_path=str(pretrained), **files, **QUICK, **options, output_dir=str(tmp_path / "b")
    )
    with pytest.raises(RunStopped):
        finetune(settings, stopped_at(3))
    assert [entries(tmp_path / name) for name in "ab"] == [[], []]


def test_weights_and_biases_receives_every_entry(data, tmp_path, monkeypatch):
    """The library requires an account, so its two functions that are used are replaced."""
    logged = {}
    run = SimpleNamespace(log=lambda entry, step: logged.setdefault(step, []).append(entry))
    library = SimpleNamespace(init=lambda **options: logged.setdefault("options", options) and run, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", library)
    pretrain(settings_for(tmp_path, data, **SHORT, wandb=True))
    assert logged["options"]["config"]["max_steps"] == 4
    written = [{k: v for k, v in entry.items() if k != "step"} for entry in entries(tmp_path) if entry["step"] == 4]
    assert logged[4] == written


def test_a_missing_library_is_named_before_old_results_are_replaced(tuned, pretrained, files, tmp_path, monkeypatch):
    shutil.copytree(tuned[0], tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("[!.]*")}
    monkeypatch.setitem(sys.modules, "wandb", None)
    settings = FinetuneSettings.of(model_name_or_path=str(pretrained), output_dir=str(tmp_path), **files, wandb=True)
    with pytest.raises(ImportError, match="--wandb requires"):
        finetune(settings.replace(overwrite_output_dir=True))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("[!.]*")} == before


@pytest.mark.parametrize(("writer", "package"), [("tensorboard", "bertfast[tensorboard]"), ("wandb", "wandb")])
def test_a_missing_metrics_library_is_named_before_the_first_step(writer, package, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if writer == "tensorboard" else "wandb", None)
    with pytest.raises(ImportError, match=rf"--{writer} requires .*{package.replace('[', '.')[:8]}"):
        pretrain(settings_for(tmp_path, data, **SHORT, **{writer: True}))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_writer_that_cannot_write_is_named_in_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where a folder belongs")
    with pytest.raises(OSError, match=rf"^{tmp_path}/tensorboard cannot be written: File exists$"):
        tensorboard(tmp_path)

    class LibraryError(Exception):
        pass

    def fail(*arguments: object, **options: object) -> None:
        raise LibraryError("no API key")

    run = SimpleNamespace(log=fail)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: run, Error=LibraryError))
    with pytest.raises(ValueError, match=r"^--wandb: no API key \(WANDB_MODE=offline"):
        wandb(tmp_path, {})({}, 1)
    sys.modules["wandb"].init = fail
    with pytest.raises(ValueError, match=r"^--wandb: no API key"):
        wandb(tmp_path, {})
