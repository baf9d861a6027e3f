"""Runs of several processes: the losses and weights equal those of one process, sharded or not."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from runs import SIZES, assert_same_weights, entries, losses, printed, torchrun
from safetensors.torch import load_file

from bertfast.cli.flags import parse
from bertfast.training.checkpoint import checkpoints
from bertfast.training.pretraining import PretrainSettings, pretrain

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


def flags(data: Path, folder: Path, accumulation: int, *others: str) -> list[str]:
    options = {
        "output-dir": folder,
        "data-dir": data,
        "max-seq-length": 24,
        "config-overrides": SIZES,
        "tokens-per-batch": 96,
        "gradient-accumulation-steps": accumulation,
        "max-steps": 5,
        "learning-rate": 0.01,
        "logging-steps": 1,
        "eval-batches": 3,
        "device": "cpu",
        "precision": "fp32",
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))] + list(others)


def children(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(word) for word in found.stdout.split()]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    while not condition():
        assert process.poll() is None, printed(log)
        time.sleep(0.1)


ACCUMULATIONS = (1, 2, 4)
PROCESSES = (2, 4)
RUNS = [
    (f"{processes} x {accumulation}{' sharded' * shard}", processes, accumulation, ["--shard"] * shard)
    for processes in reversed(PROCESSES)
    for accumulation in ACCUMULATIONS
    for shard in (False, True)
]
# The last was stopped after three steps of four sharded processes and resumed by two that are not.
STOPPED = [("stopped", 4, 1, ["--shard", "--checkpoint-layers=1"]), ("stopped", 2, 2, ["--resume"])]


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory) -> Path:
    """Runs of one, two and four processes, each in a folder of its own; those of one are named by a step's batches."""
    folder = tmp_path_factory.mktemp("runs")
    for batches in sorted({processes * accumulation for _, processes, accumulation, _ in RUNS}):
        pretrain(parse("pretrain", PretrainSettings, flags(data, folder / str(batches), batches)))
    for processes in reversed(PROCESSES):
        again = [("2 again", 2, 1, [])]
        words = []
        for name, count, accumulation, others in RUNS + STOPPED + again:
            if count == processes:
                words += ["--", "pretrain", name, *flags(data, folder / name, accumulation, *others)]
        log = folder / f"{processes}.log"
        assert torchrun(processes, log, str(HERE / "ranked_runs.py"), *words[1:]).wait(300) == 0, printed(log)
    return folder


@pytest.mark.parametrize(
    ("name", "batches"), [*((name, count * accumulation) for name, count, accumulation, _ in RUNS), ("stopped", 4)]
)
def test_ranks_compute_the_run_of_one_process(folder, name, batches):
    alone, other = folder / str(batches), folder / name
    assert losses(other) == pytest.approx(losses(alone), rel=1e-5)
    assert entries(other)[-1]["validation_loss"] == pytest.approx(entries(alone)[-1]["validation_loss"], rel=1e-4)
    weights, expected = (load_file(run / "model.safetensors") for run in (other, alone))
    assert weights.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(weights[key], expected[key], rtol=1e-3, atol=1e-4)


def test_all_ranks_stop_after_the_same_step(folder):
    assert (folder / "4.log").read_text().count("stopped: stopped after step 3, with a checkpoint") == 4


def test_two_runs_with_the_same_ranks_are_bitwise_identical(folder):
    assert losses(folder / "2 x 1") == losses(folder / "2 again")
    assert_same_weights(folder / "2 x 1", folder / "2 again")


def endless(data: Path, folder: Path, log: Path, *others: str, options: Sequence[str] = ()) -> subprocess.Popen:
    program = str(Path(sys.executable).with_name("bertfast"))
    command = [program, "pretrain", *flags(data, folder, 2, "--max-steps=100000", "--save-steps=5", *others)]
    return torchrun(2, log, *command, options=options)


def test_sigterm_stops_the_job_with_a_checkpoint(data, tmp_path):
    log, metrics = tmp_path / "log", tmp_path / "run" / "metrics.jsonl"
    process = endless(data, tmp_path / "run", log)
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, process, log)
    ranks = children(process)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        time.sleep(0.1)
    process.kill()  # it may wait for half a minute more
    assert log.read_text().count("with a checkpoint: the same command with --resume continues the run") == 2
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert len(losses(tmp_path / "run")) == int(newest.name.removeprefix("step-"))


def test_a_killed_rank_ends_the_job_and_keeps_its_checkpoints(data, tmp_path):
    log, saved = tmp_path / "log", tmp_path / "run" / "checkpoints"
    process = endless(data, tmp_path / "run", log)
    wait_for(lambda: len(checkpoints(saved)) > 0, process, log)
    os.kill(children(process)[-1], signal.SIGKILL)
    assert process.wait(90) != 0
    assert "Signal 9 (SIGKILL) received" in log.read_text()
    again = parse("pretrain", PretrainSettings, flags(data, tmp_path / "run", 4, "--max-steps=100000", "--resume"))

    class Enough(Exception):
        pass

    def stop(step: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        pretrain(again, stop)


def test_torchrun_restarts_after_a_rank_was_killed(data, tmp_path):
    log, saved = tmp_path / "log", tmp_path / "run" / "checkpoints"
    process = endless(data, tmp_path / "run", log, "--resume", options=["--max-restarts=1", "--monitor-interval=0.1"])
    wait_for(lambda: len(checkpoints(saved)) > 0, process, log)
    dead = children(process)
    os.kill(dead[-1], signal.SIGKILL)
    wait_for(lambda: ", from step " in log.read_text(), process, log)
    newest = checkpoints(saved)[-1]
    wait_for(lambda: checkpoints(saved)[-1] > newest, process, log)
    assert not set(dead) & set(children(process))
    process.terminate()
    process.wait(90)
