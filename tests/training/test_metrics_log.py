"""Where a run's metrics go besides its own file."""

import sys
from types import SimpleNamespace

import pytest
from runs import entries, losses, settings_for

from bertfast.training.pretrain import pretrain

SHORT = {"max_steps": 4, "eval_batches": 1}


def test_tensorboard_reads_them(data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pretrain(settings_for(tmp_path, data, **SHORT, tensorboard=True))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    curve = events.Scalars("masked_lm_loss")
    assert [event.step for event in curve] == [1, 2, 3, 4]
    assert [event.value for event in curve] == pytest.approx(losses(tmp_path))
    assert events.Scalars("validation_loss")[0].step == 4


def test_weights_and_biases_is_told(data, tmp_path, monkeypatch):
    """By the two calls of its library that are used; the library itself wants an account."""
    told = {}
    run = SimpleNamespace(log=lambda entry, step: told.setdefault(step, []).append(entry))
    library = SimpleNamespace(init=lambda **options: told.setdefault("options", options) and run)
    monkeypatch.setitem(sys.modules, "wandb", library)
    pretrain(settings_for(tmp_path, data, **SHORT, wandb=True))
    assert told["options"]["config"]["max_steps"] == 4
    written = [{k: v for k, v in entry.items() if k != "step"} for entry in entries(tmp_path) if entry["step"] == 4]
    assert told[4] == written


@pytest.mark.parametrize(("sink", "package"), [("tensorboard", "bertfast[tensorboard]"), ("wandb", "wandb")])
def test_a_library_that_is_not_there_is_named_before_the_first_step(sink, package, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if sink == "tensorboard" else "wandb", None)
    with pytest.raises(ImportError, match=rf"--{sink} wants .*{package.replace('[', '.')[:8]}"):
        pretrain(settings_for(tmp_path, data, **SHORT, **{sink: True}))
    assert not (tmp_path / "metrics.jsonl").exists()
