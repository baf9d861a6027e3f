"""Fine-tuning by several processes: the losses, metrics and models are those of one process."""

import json
from pathlib import Path

import pytest
import torch
from runs import assert_same_finetuning, entries, printed, torchrun
from safetensors.torch import load_file
from task_examples import write_examples
from text_pairs import write_pairs

from bertfast.cli.flags import parse
from bertfast.training import FinetuneSettings, finetune

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
# The last of the three steps of an epoch has one pass, which the second process waits for.
EXAMPLES = 36
RUNS = {  # by name: task, and flags
    "classes": ("sequence-classification", ["--class-weights", "balanced", "--label-smoothing-factor", "0.1"]),
    "accumulated": ("sequence-classification", ["--gradient-accumulation-steps", "2"]),
    "tokens": ("token-classification", ["--tokens-per-batch", "30"]),
    "spans": ("question-answering", ["--eval-steps", "2", "--optimizer", "muon"]),
    "embeddings": ("embedding", ["--tokens-per-batch", "40"]),
}
LORA = {"lora": ("sequence-classification", ["--lora-rank", "2"])}


def flags(name: str, model: Path, data: Path, folder: Path, *others: str) -> list[str]:
    """Return the flags of a run without dropout, with passes of 8 examples."""
    task, own = (RUNS | LORA)[name]
    file = data / ("pairs.tsv" if task == "embedding" else next(path.name for path in data.glob(f"{task}.*")))
    options = {
        "model-name-or-path": model,
        "task": task,
        "train-file": file,
        "validation-file": file,
        "test-file": file,
        "output-dir": folder,
        "dropout": 0.0,
        "per-device-train-batch-size": 8,
        "num-train-epochs": 2,
        "learning-rate": 1e-3,
        "logging-steps": 1,
        "device": "cpu",
        "precision": "fp32",
    }
    return [*(word for key, value in options.items() for word in (f"--{key}", str(value))), *own, *others]


@pytest.fixture(scope="module")
def folder(pretrained, tmp_path_factory) -> Path:
    """Runs of two processes, in folders of their own."""
    folder, data = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("data")
    for task in {task for task, _ in RUNS.values()} - {"embedding"}:
        path = write_examples(data, task, EXAMPLES, seed=0)
        path.rename(data / f"{task}{path.suffix}")
    write_pairs(data / "pairs.tsv", "pairs", EXAMPLES)
    runs: list[tuple[str, str, list[str]]] = [(name, name, []) for name in names()]
    drops = ["--dropout", "0.2"]
    runs += [("whole", "classes", drops), ("stopped", "classes", drops), ("stopped", "classes", [*drops, "--resume"])]
    runs += [
        ("fails", "classes", ["--train-file", "nowhere.tsv"]),
        ("features", "tokens", ["--strategy=feature-based"]),
    ]
    words = []
    for name, like, others in runs:
        words += ["--", "finetune", name, *flags(like, pretrained, data, folder / name, *others)]
    # Left for one process to continue.
    words += ["--", "finetune", "stopped", *flags("classes", pretrained, data, folder / "left", *drops)]
    log = folder / "log"
    assert torchrun(2, log, str(HERE / "ranked_runs.py"), *words[1:]).wait(300) == 0, printed(log)
    (folder / "data").symlink_to(data)
    return folder


def names() -> list[str]:
    """Return the names of the runs that can be made."""
    try:
        import peft  # noqa: F401
    except ImportError:
        return [*RUNS]
    return [*RUNS, *LORA]


@pytest.mark.parametrize("name", names())
def test_two_processes_compute_the_run_of_one(name, pretrained, folder, tmp_path):
    passes = 4 if name == "accumulated" else 2
    alone = flags(name, pretrained, folder / "data", tmp_path, "--gradient-accumulation-steps", str(passes))
    expected = finetune(parse("finetune", FinetuneSettings, alone))
    results = json.loads((folder / name / "all_results.json").read_text())
    timing = ("train_runtime", "train_tokens_per_second")
    assert {key: value for key, value in results.items() if key not in timing} == pytest.approx(
        {key: value for key, value in expected.items() if key not in timing}, rel=1e-4
    )
    found, one = ([entry["loss"] for entry in entries(run) if "loss" in entry] for run in (folder / name, tmp_path))
    assert len(found) == (4 if passes == 4 else 6)
    assert found == pytest.approx(one, rel=1e-5)
    (file,) = (path.name for path in tmp_path.glob("*model*.safetensors"))
    weights, expected_weights = (load_file(run / file) for run in (folder / name, tmp_path))
    assert weights.keys() == expected_weights.keys()
    for key, value in expected_weights.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-4)
    assert json.loads((folder / name / "run.json").read_text())["processes"] == 2


def test_a_resumed_run_is_bitwise_identical_to_an_uninterrupted_one(folder):
    """With dropout, which differs between the processes."""
    assert_same_finetuning(folder / "whole", folder / "stopped")
    assert (folder / "log").read_text().count("stopped: stopped after step 2 of 6, with a checkpoint") == 4


def test_another_number_of_processes_cannot_resume(pretrained, folder):
    alone = flags("classes", pretrained, folder / "data", folder / "left", "--dropout", "0.2", "--resume")
    with pytest.raises(ValueError, match=r"was written by 2 processes and is read by 1: start 2 \(torchrun"):
        finetune(parse("finetune", FinetuneSettings, alone))


def test_errors_are_reported(folder):
    log = (folder / "log").read_text()
    assert log.count("fails: rank 0 failed: correct the error that it printed, then start all processes again") == 1
    assert log.count("fails: --train-file nowhere.tsv: no such file") == 1
    assert log.count("features: --strategy feature-based runs in one process, not in 2: start it without torchrun") == 2
