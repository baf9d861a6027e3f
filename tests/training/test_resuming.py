"""Interrupted, killed and damaged runs resume, bitwise identical to an uninterrupted run."""

import json
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from runs import STEPS, assert_same_weights, entries, exit_code, losses, settings_for, terminated_in_training
from safetensors.torch import load_file

from bertfast.data.samples import Sampling
from bertfast.runtime.signals import RunStopped
from bertfast.training import pretraining
from bertfast.training import step as train_step
from bertfast.training.checkpoint import checkpoints, newest_whole
from bertfast.training.pretrain_checkpointing import checkpoint_to_load, is_finished
from bertfast.training.pretraining import PretrainSettings, pretrain
from bertfast.training.schedule import schedule

pytestmark = pytest.mark.slow

SHORT = {"max_steps": 12, "save_steps": 3, "gradient_accumulation_steps": 4, "eval_batches": 2}
KINDS = {
    "adamw, workers": {"optimizer": "adamw", "dataloader_num_workers": 2},
    "lamb, cosine": {"optimizer": "lamb", "schedule": "cosine"},
    "muon, ramp, two phases": {
        "sampling": Sampling(max_seq_length=12),
        "batch_ramp": 0.5,
        "second_phase_length": 24,
        "second_phase_share": 0.4,
        "schedule": "wsd",
    },
    "fp16": {"optimizer": "adamw", "precision": "fp16"},
    "bf16, recomputed, no pairs": {
        "optimizer": "adamw",
        "precision": "bf16",
        "checkpoint_layers": 1,
        "sampling": Sampling(max_seq_length=24, objective="mlm"),
    },
}


def stopped_at(step: int):
    return lambda done: signal.raise_signal(signal.SIGTERM) if done == step else None


@pytest.mark.usefixtures("any_precision_runs")
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bitwise_identical_to_an_uninterrupted_one(kind, data, tmp_path):
    settings = settings_for(tmp_path / "whole", data, **SHORT | KINDS[kind])
    pretrain(settings)
    settings = settings.replace(output_dir=str(tmp_path / "cut"))
    for step in (5, 8):
        with pytest.raises(RunStopped):
            pretrain(settings, stopped_at(step))
        settings = settings.replace(resume=True)
    pretrain(settings)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_worker_processes_do_not_change_the_run(data, tmp_path):
    for workers in (0, 1, 3):
        pretrain(settings_for(tmp_path / str(workers), data, **SHORT, dataloader_num_workers=workers))
    assert_same_weights(tmp_path / "0", tmp_path / "1")
    assert_same_weights(tmp_path / "0", tmp_path / "3")


def test_checkpointed_layers_do_not_change_the_run(data, tmp_path):
    """Activations of a layer whose dropout is a function of the token."""
    for layers in (0, 1):
        pretrain(settings_for(tmp_path / str(layers), data, **SHORT, checkpoint_layers=layers))
    assert_same_weights(tmp_path / "0", tmp_path / "1")


def test_a_run_killed_at_any_moment_resumes(data, tmp_path):
    """Killed twenty times while it trains and saves, after every step, at random moments."""
    settings = settings_for(tmp_path / "whole", data, save_steps=1, eval_steps=4)
    assert exit_code(pretrain, settings, None) == 0
    killed = settings.replace(output_dir=str(tmp_path / "killed"), resume=True)
    moments = random.Random(0)
    for _ in range(20):
        assert exit_code(pretrain, killed, moments.uniform(0, 0.2)) == -signal.SIGKILL
        if len(losses(tmp_path / "killed")) > STEPS - 5:  # the next process must not end before it is killed
            for late in checkpoints(tmp_path / "killed" / "checkpoints")[1:]:
                for file in late.iterdir():
                    file.unlink()
                late.rmdir()
    assert exit_code(pretrain, killed, None) == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing", "no checksums"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(damage, data, tmp_path, caplog):
    pretrain(settings_for(tmp_path, data, **SHORT))
    expected = load_file(tmp_path / "model.safetensors")
    older, newest = checkpoints(tmp_path / "checkpoints")
    file = newest / ("checksums.json" if damage == "no checksums" else "optimizer.safetensors")
    content = file.read_bytes()
    if damage in ("missing", "no checksums"):
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-100])
    else:
        file.write_bytes(content[:-50] + bytes([content[-50] ^ 4]) + content[-49:])
    assert newest_whole(tmp_path / "checkpoints") == older
    assert f"{newest} is damaged ({file.name}): continuing from {older.name}\n" in caplog.text
    pretrain(settings_for(tmp_path, data, **SHORT, resume=True))
    again = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("file", "content"), [("state.json", "{}"), ("state.json", "3"), ("checksums.json", "[]")])
def test_a_damaged_checkpoint_does_not_end_the_run_that_continues(file, content, data, tmp_path):
    pretrain(settings_for(tmp_path, data, **SHORT))
    _, newest = checkpoints(tmp_path / "checkpoints")
    (newest / file).write_text(content)
    pretrain(settings_for(tmp_path, data, **SHORT, resume=True, save_total_limit=9))
    assert newest_whole(tmp_path / "checkpoints") == newest


def test_a_run_with_only_damaged_checkpoints_is_refused(data, tmp_path):
    pretrain(settings_for(tmp_path, data, **SHORT))
    for saved in checkpoints(tmp_path / "checkpoints"):
        (saved / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        pretrain(settings_for(tmp_path, data, **SHORT, resume=True))


def test_the_best_checkpoint_is_kept(data, tmp_path, monkeypatch):
    worse = iter([5.0, 1.0, 3.0, 4.0, 6.0, 7.0])
    validate = pretraining.validate
    monkeypatch.setattr(pretraining, "validate", lambda *a: validate(*a) | {"validation_loss": next(worse)})
    pretrain(settings_for(tmp_path, data, **SHORT | {"save_steps": 2, "eval_steps": 2}))
    names = [path.name for path in checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000004", "step-00000010", "step-00000012"]


def test_a_file_with_a_pickle_is_not_loaded(data, tmp_path):
    """A pickle in a checkpoint, or instead of one, must not execute code."""

    class Malicious:
        def __reduce__(self):
            return (exec, ("raise SystemExit('code of the pickle ran')",))

    pretrain(settings_for(tmp_path, data, **SHORT))
    newest = checkpoints(tmp_path / "checkpoints")[-1]
    torch.save({"bert": Malicious()}, newest / "optimizer.pt")
    torch.save({"bert": Malicious()}, newest / "optimizer.safetensors")
    pretrain(settings_for(tmp_path, data, **SHORT, resume=True))  # from the checkpoint before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("config.json", "tokenizer.json", "vocab.txt"):
        (foreign / name).write_bytes((tmp_path / name).read_bytes())
    torch.save({"bert": Malicious()}, foreign / "pytorch_model.bin")
    # transformers 4 raises OSError.
    with pytest.raises((ValueError, OSError), match=r"damaged or holds other things than weights|cannot be read"):
        pretrain(settings_for(tmp_path / "run", data, init_from=str(foreign), config_overrides=""))


@pytest.mark.parametrize(("flags", "status"), [([], 143), (["--sigterm-exit-code", "0"], 0)])
def test_the_exit_status_tells_that_a_signal_ended_the_program(flags, status, data, tmp_path):
    command = [str(Path(sys.executable).with_name("bertfast")), "pretrain", "--output-dir", str(tmp_path / "run")]
    command += ["--data-dir", str(data), "--max-seq-length", "24", "--tokens-per-batch", "96", "--preset", "tiny"]
    command += ["--max-steps", "100000", "--logging-steps", "1", "--device", "cpu", *flags]
    printed, exit_status = terminated_in_training(command, tmp_path / "run")
    assert "with a checkpoint" in printed
    assert exit_status == status


def test_a_step_can_be_replayed(data, tmp_path, capsys):
    pretrain(settings_for(tmp_path, data, **SHORT))
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    for step in (10, 12):
        replayed = pretrain(settings_for(tmp_path, data, **SHORT, replay=step))
        assert replayed["masked_lm_loss"] == losses(tmp_path)[step - 1]
        assert "all gradients are finite" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before
    with pytest.raises(ValueError, match=r"the run has \d+ steps: choose one of them for --replay, not 99"):
        pretrain(settings_for(tmp_path, data, **SHORT, replay=99))
    with pytest.raises(
        ValueError,
        match=r"--replay 2 needs an intact checkpoint of an earlier step, and .* has \d+, \d+: choose a later one",
    ):
        pretrain(settings_for(tmp_path, data, **SHORT, replay=2))


def test_check_replay_detects_a_step_that_differs(data, tmp_path, monkeypatch):
    pretrain(settings_for(tmp_path / "plain", data, **SHORT))
    pretrain(settings_for(tmp_path / "checked", data, **SHORT, check_replay=3, deterministic=True))
    assert_same_weights(tmp_path / "plain", tmp_path / "checked")
    assert not torch.are_deterministic_algorithms_enabled()
    loss, calls = train_step.pretraining_loss, iter(range(1000))

    def flipped(*arguments, **options):
        result = loss(*arguments, **options)
        if next(calls) == 9:  # in the second computation of a step of four batches
            result.masked_lm.data += 1e-3
        return result

    monkeypatch.setattr(train_step, "pretraining_loss", flipped)
    with pytest.raises(RunStopped, match="step 2 was computed twice with different results"):
        pretrain(settings_for(tmp_path / "broken", data, **SHORT, check_replay=2))


def test_a_loss_spike_is_marked(data, tmp_path, monkeypatch):
    gradients, calls = train_step.TrainStep.gradients, iter(range(100))

    def jump(step, batches, masked, pairs):
        sums = gradients(step, batches, masked, pairs)
        if next(calls) == 7:
            sums[0] = 50.0 * masked
        return sums

    monkeypatch.setattr(train_step.TrainStep, "gradients", jump)
    pretrain(settings_for(tmp_path, data, **SHORT | {"logging_steps": 5}))
    assert [entry["step"] for entry in entries(tmp_path) if entry.get("spike")] == [8]


def test_metrics_have_throughput_and_waiting_time(data, tmp_path):
    pretrain(settings_for(tmp_path, data, **SHORT))
    entry = next(entry for entry in entries(tmp_path) if "tflops" in entry)
    assert 0 < entry["gemm_efficiency"] < 1.5
    assert 0 <= entry["waited_for_batches"] < 1
    assert entry["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_ramp": 0.5, "minutes": 1.0, "max_steps": 0}, "cannot be combined with --minutes"),
        ({"batch_ramp": 0.5, "gradient_accumulation_steps": 2}, "multiple of 4"),
        ({"second_phase_length": 64}, "--second-phase-length 64 is more than the model's 32 positions"),
        (
            {"tokens_per_batch": 2_000_000_000},
            r"a batch of 2000000000 tokens does not fit .* --tokens-per-batch \d+ is the largest that fits",
        ),
        ({"shard": True, "optimizer": "muon"}, "--shard requires --optimizer adamw"),
        ({"train_file": ["a.txt"], "cased": True}, "--train-file and --cased would have no effect"),
        ({"gradient_accumulation_steps": 0}, "at least 1, got 0"),
    ],
)
def test_contradictory_settings_are_refused_before_any_work(changes, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        pretrain(settings_for(tmp_path / "run", data, **changes))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_first_losses_of_tiny_equal_the_golden_losses(data, tmp_path):
    """Two runs are bitwise identical, and within 1e-4 of the golden losses, computed on another CPU."""
    settings = PretrainSettings.of(
        output_dir=str(tmp_path / "one"),
        data_dir=str(data),
        sampling=Sampling(max_seq_length=32),
        preset="tiny",
        tokens_per_batch=256,
        max_steps=30,
        logging_steps=1,
        eval_batches=1,
        save_steps=100,
        device="cpu",
        precision="fp32",
    )
    pretrain(settings)
    pretrain(settings.replace(output_dir=str(tmp_path / "other")))
    assert losses(tmp_path / "one") == losses(tmp_path / "other")
    golden = json.loads(Path(__file__).with_name("golden_losses.json").read_text())
    assert losses(tmp_path / "one") == pytest.approx(golden, abs=1e-4)


def test_a_damaged_only_checkpoint_does_not_promise_another(data, tmp_path, caplog):
    pretrain(settings_for(tmp_path, data, **SHORT))
    for saved in checkpoints(tmp_path / "checkpoints"):
        (saved / "state.json").unlink()
    assert newest_whole(tmp_path / "checkpoints") is None
    assert caplog.text.count("is damaged (state.json)\n") == 2
    with pytest.raises(ValueError, match=r"--replay 9 needs an intact checkpoint of an earlier step"):
        pretrain(settings_for(tmp_path, data, **SHORT, replay=9))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_finished_run_can_be_extended(optimizer, data, tmp_path):
    """With the next batches, at the learning rate of the longer run, also if the extension is interrupted."""
    settings = settings_for(tmp_path / "one", data, **SHORT, optimizer=optimizer)
    pretrain(settings)
    first = losses(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    longer = settings.replace(max_steps=18, resume=True)
    assert is_finished(tmp_path / "one")
    pretrain(longer)
    assert losses(tmp_path / "one")[:12] == first
    rates = [entry["learning_rate"] for entry in entries(tmp_path / "one") if "learning_rate" in entry]
    peak, warmup = settings.optimizer.learning_rate, settings.optimizer.warmup_ratio
    assert len(rates) == 18
    assert rates[12:] == [peak * schedule("linear", step / 18, warmup) for step in range(12, 18)]
    longer = longer.replace(output_dir=str(tmp_path / "two"))
    with pytest.raises(RunStopped):
        pretrain(longer, stopped_at(14))
    assert not is_finished(tmp_path / "two")
    pretrain(longer)
    assert is_finished(tmp_path / "two")
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    with pytest.raises(ValueError, match="--max-steps was 18 and is 17: "):
        pretrain(longer.replace(max_steps=17))
    with pytest.raises(ValueError, match="--max-steps was 18 and is 30: "):
        pretrain(longer.replace(max_steps=30, resume=False, replay=17))
    with pytest.raises(RunStopped, match="stopped after step 19"):  # as a run of an hour
        pretrain(longer.replace(max_steps=0, minutes=60.0), stopped_at(19))


def test_a_finished_run_in_minutes_or_epochs_can_be_extended(data, tmp_path):
    short = SHORT | {"max_steps": 0}
    for name, first, then in (("minutes", 0.005, 0.01), ("num_train_epochs", 0.5, 1.0)):
        pretrain(settings_for(tmp_path / name, data, **short, **{name: first}))
        done = len(losses(tmp_path / name))
        pretrain(settings_for(tmp_path / name, data, **short, **{name: then}, resume=True))
        assert len(losses(tmp_path / name)) > done
        with pytest.raises(ValueError, match=rf"--{name.replace('_', '-')} was {then} and is {first}: "):
            pretrain(settings_for(tmp_path / name, data, **short, **{name: first}, resume=True))


def test_other_changes_and_lengths_of_an_unfinished_run_are_refused(data, tmp_path):
    settings = settings_for(tmp_path / "run", data, **SHORT)
    with pytest.raises(RunStopped):
        pretrain(settings, stopped_at(5))
    assert not is_finished(tmp_path / "run")
    only = "only a finished run, without --batch-ramp and --second-phase-length, can be made longer"
    unfinished = settings.replace(max_steps=30, resume=True)
    with pytest.raises(ValueError, match=r"--max-steps was 12 and is 30: repeat the command") as error:
        pretrain(unfinished)
    assert only not in str(error.value)  # nor is there a model from which a new run could start
    pretrain(settings.replace(resume=True))
    with pytest.raises(ValueError, match="--seed was 42 and is 7: ") as error:
        pretrain(unfinished.replace(seed=7))
    assert "--max-steps was" not in str(error.value)
    ramp = settings_for(tmp_path / "ramp", data, **SHORT, batch_ramp=0.5)
    pretrain(ramp)
    message = rf"--max-steps was 12 and is 30: .*{only}; .*--init-from {tmp_path / 'ramp'} and another --output-dir$"
    with pytest.raises(ValueError, match=message):
        pretrain(ramp.replace(max_steps=30, resume=True))


def test_resuming_without_a_checkpoint_is_said(data, tmp_path, caplog):
    assert checkpoint_to_load(settings_for(tmp_path, data, **SHORT, resume=True)) is None
    assert f"there is no checkpoint in {tmp_path}: starting from step 0" in caplog.text
