"""Several processes on one run: the same losses and weights as one, whatever each of them does and keeps."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from runs import SIZES, assert_same_weights, entries, losses
from safetensors.torch import load_file

from bertfast.cli import parse
from bertfast.training.pretrain import PretrainSettings, pretrain
from bertfast.training.state import checkpoints

BATCHES = 4  # of a step
HERE = Path(__file__).parent


def flags(data: Path, folder: Path, processes: int, *others: str) -> list[str]:
    options = {
        "output-dir": folder,
        "data-dir": data,
        "max-seq-length": 24,
        "config-overrides": SIZES,
        "tokens-per-batch": 96,
        "gradient-accumulation-steps": BATCHES // processes,
        "max-steps": 6,
        "learning-rate": 0.01,
        "logging-steps": 1,
        "eval-batches": 3,
        "device": "cpu",
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))] + list(others)


def torchrun(processes: int, log: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    with log.open("w") as output:
        return subprocess.Popen([*command, *arguments], env=environment, stdout=output, stderr=subprocess.STDOUT)


def children(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(word) for word in found.stdout.split()]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    while not condition():
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory) -> Path:
    """Runs of one, two and four processes, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("runs")
    pretrain(parse("pretrain", PretrainSettings, flags(data, folder / "alone", 1)))
    plans = {
        4: {"four": [], "four sharded": ["--shard", "--checkpoint-layers=1"], "stopped": ["--shard"]},
        2: {"two": [], "two again": [], "two sharded": ["--shard"], "stopped": ["--resume"]},
    }
    for processes, plan in plans.items():
        words = [[name, *flags(data, folder / name, processes, *others)] for name, others in plan.items()]
        words[1:] = [["--", *some] for some in words[1:]]
        log = folder / f"{processes}.log"
        assert torchrun(processes, log, str(HERE / "ranked_runs.py"), *chain(*words)).wait(120) == 0, log.read_text()
    return folder


@pytest.mark.parametrize("name", ["two", "four", "two sharded", "four sharded", "stopped"])
def test_as_many_as_there_are_compute_the_run_of_one(folder, name):
    """The last was stopped after three steps of four sharded processes and resumed by two that are not."""
    alone, other = folder / "alone", folder / name
    assert losses(other) == pytest.approx(losses(alone), rel=1e-5)
    assert entries(other)[-1]["validation_loss"] == pytest.approx(entries(alone)[-1]["validation_loss"], rel=1e-4)
    weights, expected = (load_file(run / "model.safetensors") for run in (other, alone))
    assert weights.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(weights[key], expected[key], rtol=1e-3, atol=1e-4)


def test_all_stop_after_the_same_step(folder):
    assert (folder / "4.log").read_text().count("stopped: stopped after step 3, with a checkpoint") == 4


def test_twice_the_same_ranks_give_the_same_bits(folder):
    assert losses(folder / "two") == losses(folder / "two again")
    assert_same_weights(folder / "two", folder / "two again")


def endless(data: Path, folder: Path, log: Path) -> subprocess.Popen:
    program = str(Path(sys.executable).with_name("bertfast"))
    return torchrun(2, log, program, "pretrain", *flags(data, folder, 2, "--max-steps=100000", "--save-steps=5"))


def test_sigterm_stops_the_job_with_a_checkpoint(data, tmp_path):
    log, journal = tmp_path / "log", tmp_path / "run" / "metrics.jsonl"
    process = endless(data, tmp_path / "run", log)
    wait_for(lambda: journal.exists() and journal.read_text().count("\n") > 3, process, log)
    ranks = children(process)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        time.sleep(0.1)
    process.kill()  # it may wait for half a minute more
    assert log.read_text().count("with a checkpoint: the same command with --resume goes on") == 2
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert len(losses(tmp_path / "run")) == int(newest.name.removeprefix("step-"))


def test_a_rank_that_dies_ends_the_job_and_leaves_its_checkpoints(data, tmp_path):
    log, saved = tmp_path / "log", tmp_path / "run" / "checkpoints"
    process = endless(data, tmp_path / "run", log)
    wait_for(lambda: len(checkpoints(saved)) > 0, process, log)
    os.kill(children(process)[-1], signal.SIGKILL)
    assert process.wait(90) != 0
    assert "Signal 9 (SIGKILL) received" in log.read_text()
    again = parse("pretrain", PretrainSettings, flags(data, tmp_path / "run", 1, "--max-steps=100000", "--resume"))

    class Enough(Exception):
        pass

    def stop(step: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        pretrain(again, stop)
