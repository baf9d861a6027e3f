"""The benchmarks run at small sizes, and report what they should."""

import argparse
import gzip
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from bench import arguments, harness, result_files
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.ops.cuda_build import CudaBuild
from bertfast.runtime import machine

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def run(*command: str, **options) -> subprocess.CompletedProcess:
    """Run a Python program on one thread, with `bench` on its path."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, **options)


def program(name: str, *options: str) -> subprocess.CompletedProcess:
    """Run a program of `bench` on one thread."""
    ran = run("-m", f"bench.{name}", *options)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran


def test_speedrun_trains_both_sides_and_finetunes(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"house {i} is old and the river is wide . it was cold ." for i in range(300)))
    corpus = CorpusSettings([str(text)], vocab_size=128, validation_split_percentage=20, processes=1)
    (tmp_path / "sst-2").mkdir()
    for split in ("train", "dev"):
        rows = ["sentence\tlabel", *("the house is old\t1", "it was cold\t0") * 20]
        (tmp_path / "sst-2" / f"{split}.tsv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    with tarfile.open(tmp_path / "archive.tar.xz", "w:xz") as archive:
        archive.add(prepare(PrepareSettings(str(tmp_path / "made"), corpus)), "shards")
        archive.add(tmp_path / "sst-2", "sst-2")
    options = ("--preset=tiny", "--minutes=0.02", "--tokens=256", f"--output={tmp_path / 'run'}")
    program("end_to_end.speedrun", str(tmp_path / "archive.tar.xz"), *options, f"--results={tmp_path}")
    result = json.loads((tmp_path / "speedrun.json").read_text())
    for side in ("bertfast", "transformers"):
        losses = [one["validation_loss"] for one in result[side]["validations"]]
        assert losses[-1] < losses[0]
        assert result[side]["tokens_per_second"] > 0
    assert result["finetuned"]["metrics"]["eval_accuracy"] > 0
    assert not any(str(tmp_path) in path.read_text() for path in tmp_path.glob("*.json"))


def test_reasons_in_result_files_have_no_paths_of_the_machine():
    error = ImportError("cannot import name 'x' from 'y' (/site-packages/y.py)\nmore")
    assert harness.reason_of(error) == "ImportError: cannot import name 'x' from 'y'"
    assert harness.reason_of(TimeoutError()) == "TimeoutError:"


def test_inference_is_compared_with_the_installed_runtimes(tmp_path):
    options = ("--repeats=1", f"--data={tmp_path / 'nowhere'}", f"--results={tmp_path}")
    program("end_to_end.inference", "trial", *options)
    result = json.loads((tmp_path / "inference-trial.json").read_text())
    assert result["precisions"].keys() == result["not_run"].keys() | result["errors"].keys()
    for name, workload in result["workloads"].items():
        assert workload["runtimes"].keys() >= {"bertfast", "transformers", "transformers, eager attention"}
        assert workload["lower_bound_s"]["fp32"] > 0
        in_order = name.split(",")[0] in ("sst2", "squad")
        assert (workload["padded_tokens"] > sum(workload["lengths"])) == in_order
    ordered, in_length = (result["workloads"][f"sst2, {order}"] for order in ("file order", "sorted"))
    assert sorted(ordered["lengths"]) == in_length["lengths"]
    assert in_length["padded_tokens"] <= ordered["padded_tokens"]  # equal, since a trial has one batch


def test_at_least_one_round_is_required():
    assert arguments.at_least_one("12") == 12
    for text in ("0", "-1", "1.5", "one"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a positive integer: type 1 or more"):
            arguments.at_least_one(text)
    ran = run("-m", "bench.end_to_end.inference", "trial", "--repeats", "0")
    assert ran.returncode == 2
    assert "argument --repeats: '0' is not a positive integer" in ran.stderr


def test_a_runtime_with_wrong_outputs_is_not_timed():
    from bench.end_to_end.inference import wrong_outputs

    assert wrong_outputs("fp32", {"relative": 1e-6, "cosine": 1.0}) is None
    assert "differ by 0.01" in wrong_outputs("fp32", {"relative": 0.01, "cosine": 1.0})
    assert "differ by nan" in wrong_outputs("bf16", {"relative": float("nan"), "cosine": float("nan")})
    assert wrong_outputs("int8", {"relative": 0.3, "cosine": 0.97}) is None
    assert "a cosine of 0.500" in wrong_outputs("int8", {"relative": 0.3, "cosine": 0.5})


def test_growth_is_measured_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    program("end_to_end.growth", "--max-length=128", "--max-sequences=1", "--preset=tiny", f"--results={tmp_path}")
    sweeps = json.loads((tmp_path / "growth.json").read_text())["sweeps"]
    assert [len(results) for results in sweeps.values()] == [2, 2, 2]
    for result in [result for results in sweeps.values() for result in results]:
        assert min(result["seconds_samples"]) <= result["seconds"] <= max(result["seconds_samples"])
        assert result["bound_s"] > 0
        assert result["peak_bytes"] >= 0.9 * result["bound_bytes"] > 0, result
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("other", [1.9, 1.0])
def test_ratios_are_taken_in_one_mode_of_the_machine(other, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    mode = [harness.Sample(2.0, other), harness.Sample(2.0, other)]
    mixed = [harness.Sample(1.0, 1.9), *mode, harness.Sample(9.0, 1.0)]
    if other > 1.5:
        assert harness.seconds_of(mixed) == [1.0, 2.0, 2.0]
    else:
        assert harness.seconds_of(mixed) == [2.0, 2.0, 9.0]
    assert harness.median_ratio(mixed, mixed) == 1


def test_the_cost_of_a_bf16_residual_stream_is_measured(tmp_path):
    (tmp_path / "corpus").mkdir()
    text = "\n\n".join(f"The {n}th sentence of a text.\nAnother one follows it, {n} times." for n in range(200))
    for split in ("train", "valid"):
        with lzma.open(tmp_path / "corpus" / f"wikitext2-detok-{split}.txt.xz", "wt", encoding="utf-8") as file:
            file.write(text)
    program("end_to_end.residual_precision", str(tmp_path), "--steps=3", "--seeds=1", f"--results={tmp_path}")
    result = json.loads((tmp_path / "residual_precision.json").read_text())
    fp32, bf16 = (result["runs"][stream]["1"] for stream in ("fp32", "bf16"))
    assert len(fp32["losses"]) == len(bf16["losses"]) == 3
    assert fp32["losses"] != bf16["losses"]
    assert result["bf16_minus_fp32"]["end"] == [pytest.approx(bf16["end"] - fp32["end"])]


def commit(folder: Path, *files: str) -> None:
    """Create a repository with one commit of the given files."""
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-C", str(folder))
    subprocess.run([*git, "init", "-q"], check=True)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("committed")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)


def test_changes_of_results_and_log_are_not_uncommitted_changes(tmp_path):
    names = ("bench/results/old.json", "bench/LOG.md", "bench/harness.py", "setup.py")
    commit(tmp_path, *names)
    for name in (*names[:2], "bench/untracked.py"):
        (tmp_path / name).write_text("changed")
    assert machine.changed_files(tmp_path) == []
    for name in names[2:]:
        (tmp_path / name).write_text("changed")
    assert machine.changed_files(tmp_path) == list(names[2:])


def test_without_a_repository_nothing_is_uncommitted(tmp_path):
    assert machine.changed_files(tmp_path) == []


def test_without_a_repository_the_commit_is_that_of_a_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("BERTFAST_COMMIT", raising=False)
    assert result_files.commit_of(tmp_path, False) == ""
    monkeypatch.setenv("BERTFAST_COMMIT", "0123456789ab")
    assert result_files.commit_of(tmp_path, False) == "0123456789ab"
    commit(tmp_path, "setup.py")
    assert re.fullmatch("[0-9a-f]{12}", result_files.commit_of(tmp_path, False))
    assert result_files.commit_of(tmp_path, True).endswith("+changes")


def test_results_of_an_unknown_commit_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(result_files, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(result_files, "_CHANGED", [])
    monkeypatch.setattr(result_files, "_COMMIT", "")
    with pytest.raises(SystemExit, match="set BERTFAST_COMMIT to the commit of these files"):
        result_files.require_clean_tree(tmp_path / "results" / "any.json")
    result_files.require_clean_tree(tmp_path / "elsewhere")


def test_the_library_of_a_result_is_identified(monkeypatch, tmp_path):
    (tmp_path / "library.so").write_bytes(b"code")
    built = CudaBuild(nvcc="13.0.88", reason=None, architectures={}, missing={}, slow={}, commit="0123-dirty")
    monkeypatch.setattr(result_files.cuda_build, "BUILD", built)
    monkeypatch.setattr(result_files.native, "UNAVAILABLE_REASON", None)
    monkeypatch.setattr(result_files.native, "path", lambda: tmp_path / "library.so")
    found = result_files._library()
    assert (found["nvcc"], found["commit"], len(found["sha256"])) == ("13.0.88", "0123-dirty", 16)
    monkeypatch.setattr(result_files.native, "UNAVAILABLE_REASON", "not built")
    assert result_files._library() == {}


def test_results_of_uncommitted_code_are_rejected_in_the_repository_only(tmp_path, monkeypatch):
    monkeypatch.setattr(result_files, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(result_files, "_CHANGED", ["setup.py"])
    monkeypatch.setattr(result_files, "_COMMIT", "0123456789ab+changes")
    with pytest.raises(SystemExit, match=r"uncommitted changes \(setup.py\): commit them, or .* --results"):
        result_files.require_clean_tree(tmp_path / "results" / "avx512")
    with pytest.raises(SystemExit):
        result_files.write_result("any", {}, tmp_path / "results")
    assert not (tmp_path / "results").exists()
    assert result_files.write_result("any", {}, tmp_path / "elsewhere").exists()
    monkeypatch.setattr(result_files, "_CHANGED", [])
    result_files.require_clean_tree(tmp_path / "results")


@pytest.mark.parametrize("path", sorted((ROOT / "bench").rglob("*.py")), ids=lambda path: path.stem)
def test_every_program_checks_the_tree_before_it_measures(path):
    source = path.read_text()
    writes = any(text in source for text in ("write_result(", "result_parser(", "RESULTS /", "--results"))
    if path.stem not in ("arguments", "result_files") and writes:
        assert "require_clean_tree(" in source


def test_no_result_was_measured_with_uncommitted_changes():
    results = [path for path in (ROOT / "bench" / "results").rglob("*") if path.suffix in (".json", ".md")]
    assert [str(path) for path in results if "+changes" in path.read_text()] == []


@pytest.mark.parametrize("name", ["bertfast", "torch", "F.linear_cross_entropy"])
def test_losses_agree_before_their_memory_counts(name):
    from bench.end_to_end import vocabulary

    found = vocabulary.point(argparse.Namespace(point=(name, "96"), rows=8, width=16))
    assert found["seconds"] > 0
    assert found["bound_bytes"] == 4 * (8 * 16 + 96 * 16 + 96)
    assert found["bound_s"] > 0
    assert found["relative_error"] < 1e-5
