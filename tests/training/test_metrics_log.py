"""TensorBoard and Weights & Biases writers of the metrics log."""

import sys
from types import SimpleNamespace

import pytest
from runs import entries, losses, settings_for

from bertfast.training.metrics_log import tensorboard, wandb
from bertfast.training.pretrain import pretrain

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
