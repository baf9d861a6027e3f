"""`bench.end_to_end.finetuning` trains, evaluates and times both sides on each kind of task; `int8_accuracy` too."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sentiment import FILLERS
from task_examples import write_examples

from bench.end_to_end.finetuning import CASES
from bertfast import BertConfig, BertForPreTraining
from bertfast.data.tokenizer import save_tokenizer, train_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TASKS = {
    "sst-2": "sequence-classification",
    "wnut": "token-classification",
    "codah": "multiple-choice",
    "squad": "question-answering",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder of a tiny model for sequences of 384 tokens, as the task squad has them."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([" ".join([*FILLERS, "good", "bad"])] * 20, 256)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=384, **sizes)
    BertForPreTraining(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def write_data(folder: Path, name: str) -> None:
    """Write the files of a task under the names that the program reads."""
    for seed, file in enumerate((CASES[name].train, CASES[name].validation)):
        text = write_examples(folder, TASKS[name], rows=40, seed=seed).read_text()
        if name == "sst-2":
            text = text.replace("\tgood", "\t1").replace("\tbad", "\t0")
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(gzip.compress(text.encode()))


def finetuning(model: Path, folder: Path, name: str, *options: str, program: str = "finetuning") -> None:
    write_data(folder, name)
    folders = ["--output", str(folder), "--results", str(folder)]
    command = [sys.executable, "-m", f"bench.end_to_end.{program}", str(model), str(folder), "--tasks", name, *folders]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("name", TASKS)
def test_both_sides_are_trained_and_evaluated_with_the_same_metrics(name, model, tmp_path):
    finetuning(model, tmp_path, name, "--epochs=1")
    result = json.loads((tmp_path / f"finetuning-{name}-1-epochs.json").read_text())
    sides = [result[side] for side in ("bertfast", "transformers", "random")]
    assert all(side["seconds"] > 0 and side["train_loss"] > 0 for side in sides)
    assert all(side["metrics"].keys() >= sides[1]["metrics"].keys() > set() for side in sides)


def test_seeds_and_models_have_results_of_their_own(model, tmp_path):
    options = ("--epochs=1", "--seeds", "1", "2", "--sides", "bertfast", "transformers")
    finetuning(model, tmp_path, "sst-2", "--name=own", *options)
    files = [tmp_path / f"finetuning-own-sst-2-1-epochs-seed-{seed}.json" for seed in (1, 2)]
    first, second = (json.loads(file.read_text()) for file in files)
    assert sorted(tmp_path.glob("finetuning-*.json")) == files
    for side in ("bertfast", "transformers"):
        assert (first[side]["seed"], second[side]["seed"]) == (1, 2)
        assert first[side]["train_loss"] != second[side]["train_loss"]
        assert first[side]["commit"] == first["origin"]["commit"]
    runs = tmp_path / "own-sst-2-1-epochs-seed-1-bertfast.json"
    runs.write_text(runs.read_text().replace(first["origin"]["commit"], "0123456789ab"))
    finetuning(model, tmp_path, "sst-2", "--name=own", *options, "random")
    again = json.loads(files[0].read_text())
    assert again["bertfast"] == first["bertfast"] | {"commit": "0123456789ab"}  # it was not repeated
    assert again["transformers"] == first["transformers"]
    assert again["random"]["seed"] == 1
    finetuning(model, tmp_path, "sst-2", "--name=own", *options)
    assert json.loads(files[0].read_text())["random"] == again["random"]  # sides of earlier calls stay in the result
    other = shutil.copytree(model, tmp_path / "other")
    (other / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(AssertionError, match="is of another model: name another --output, or this model with --name"):
        finetuning(other, tmp_path, "sst-2", "--name=own", *options)


def test_steps_of_both_sides_are_timed(model, tmp_path):
    finetuning(model, tmp_path, "sst-2", "--speed=1")
    result = json.loads((tmp_path / "finetuning-speed-sst-2.json").read_text())
    assert result["median_ratio"] == pytest.approx(result["transformers_s"][0] / result["bertfast_s"][0])
    assert 0 < result["lower_bound_s"] < result["bertfast_s"][0]
    assert result["gemm_gflops"] > 0


def test_a_fine_tuned_model_is_evaluated_and_timed_in_int8(model, tmp_path):
    finetuning(model, tmp_path, "sst-2", "--repeats=1", program="int8_accuracy")
    found = json.loads((tmp_path / "int8_accuracy.json").read_text())["tasks"]["sst-2"]
    fp32, int8 = found["accuracy"]["fp32"], found["accuracy"]["int8"]
    assert (fp32["equal_predictions"], fp32["cosine_mean"]) == (1, pytest.approx(1))
    assert 0.9 < int8["cosine_p01"] < int8["cosine_mean"] < 1
    for workload in found["workloads"].values():
        assert workload["precisions"].keys() == found["accuracy"].keys()
        assert sum(workload["lengths"]) <= workload["padded_tokens"]
        assert 0 < workload["lower_bound_s"]["fp32"] < workload["precisions"]["fp32"]["median_s"]
