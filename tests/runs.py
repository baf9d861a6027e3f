"""A pre-training run that takes a second."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bertfast.data.samples import Sampling
from bertfast.training.pretraining import PretrainSettings

SIZES = "num_hidden_layers=1,hidden_size=32,num_attention_heads=2,intermediate_size=64,max_position_embeddings=32"
STEPS = 20


def settings_for(folder: Path, data: Path | None, **changes) -> PretrainSettings:
    values = {
        "data_dir": data and str(data),
        "sampling": Sampling(max_seq_length=24),
        "config_overrides": SIZES,
        "tokens_per_batch": 96,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "optimizer": "muon",
        "logging_steps": 1,
        "save_steps": 5,
        "eval_batches": 4,
        "device": "cpu",
        "precision": "fp32",
    }
    return PretrainSettings.of(output_dir=str(folder), **(values | changes))


def entries(folder: Path) -> list[dict]:
    """What the run wrote into metrics.jsonl, whole lines of it."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(folder: Path) -> list[float]:
    """Return the masked-LM losses of a run's steps."""
    return [entry["masked_lm_loss"] for entry in entries(folder) if "masked_lm_loss" in entry]


def assert_same_weights(one: Path, other: Path) -> None:
    """Assert that the weights of two model folders are bitwise identical."""
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def stopped_at(step: int) -> Callable[[int], None]:
    """Return an `on_step` that sends SIGTERM to this process after a step."""
    return lambda done: signal.raise_signal(signal.SIGTERM) if done == step else None


def assert_same_finetuning(one: Path, other: Path, weights: str = "model") -> None:
    """Assert that two runs have the same model, losses, metrics and predictions, and no checkpoint left."""
    timing = {"tokens_per_second", "train_runtime", "train_tokens_per_second"}
    runs = []
    for folder in (one, other):
        assert not (folder / "checkpoints").exists()
        metrics = [*entries(folder), json.loads((folder / "all_results.json").read_text())]
        metrics = [{name: value for name, value in entry.items() if name not in timing} for entry in metrics]
        files = [*folder.glob(f"{weights}*.safetensors"), *folder.glob("predictions_*")]
        assert len(files) > 0
        runs.append((metrics, {path.name: path.read_bytes() for path in files}))
    assert runs[0] == runs[1]


def run_until_killed(program: Callable, settings: Any, seconds: float | None) -> None:
    """Pre-train or fine-tune in a process of its own, killed that long after its first step; None: not killed.

    Steps take at least 0.05 seconds, so that a test knows how many of them a killed process has done at most.
    """
    torch.set_num_threads(1)
    timer = None if seconds is None else threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))

    def on_step(step: int) -> None:
        if timer is not None:
            if timer.ident is None:
                timer.start()
            time.sleep(0.05)

    program(settings, on_step)


def exit_code(program: Callable, settings: Any, seconds: float | None) -> int:
    """Return the exit code of `run_until_killed`."""
    # Modules that the server of processes imports are not imported again in each of them.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["bertfast.training.finetuning", "bertfast.training.pretraining"])
    process = processes.Process(target=run_until_killed, args=(program, settings, seconds))
    process.start()
    process.join()
    return process.exitcode


def terminated_in_training(command: list[str], folder: Path) -> tuple[str, int]:
    """Run a program that trains, and send it SIGTERM once it has logged a step into a folder.

    Returns:
        Its standard error, and its exit status.
    """
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    return process.communicate(timeout=60)[1], process.returncode


def torchrun(processes: int, log: Path, *arguments: str, options: Sequence[str] = ()) -> subprocess.Popen:
    """Start processes that run a program with arguments, and write what they print to a file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONFAULTHANDLER": "1"}
    with log.open("w") as output:
        return subprocess.Popen([*command, *arguments], env=environment, stdout=output, stderr=subprocess.STDOUT)


def printed(log: Path) -> str:
    """The end of what the ranks printed, without torchrun's report of a failure, which is long and follows it."""
    return log.read_text().partition("multiprocessing.errors.ChildFailedError")[0][-4000:]
