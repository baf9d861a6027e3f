"""The benchmarks run at small sizes, and report what they should."""

import argparse
import gzip
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import harness
from bench.ops.conftest import json_file
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.ops.cuda_build import CudaBuild

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
OPERATIONS = {path.stem for path in (ROOT / "bench" / "ops").glob("*.py")} - {"__init__", "conftest"}

SQUARE = """
import os
import signal
from dataclasses import dataclass

import torch
from bench.cases import Case, Implementation, Work


@dataclass(frozen=True, kw_only=True)
class Square(Case):
    size = "8"

    def inputs(self, generator):
        return [self.normal(generator, 8)]

    def definition(self, x):
        return x * x

    def work(self, direction):
        return Work(32, 8)


def broken(case):
    raise RuntimeError("not available")


def unavailable(case):
    raise ValueError("square: implementation 'cuda' is not available: no nvcc; pass implementation='reference'")


def killed(case):
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted(case):
    raise KeyboardInterrupt


def right(case):
    return torch.square


def backwards(case):
    return Implementation(torch.square, lambda x: [x.flip(0)], lambda y: y.flip(0))


def cube(case):
    return lambda x: x * x * x


def nothing(case):
    return lambda x: x * x * float("nan")


CASES = {"small": [Square()]}


def test_square(measure):
    measure()
"""


def run(*command: str, **options) -> subprocess.CompletedProcess:
    """Run a Python program on one thread, with `bench` on its path."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, **options)


def benchmark(folder: Path, results: Path) -> tuple[subprocess.CompletedProcess, dict]:
    """Run the benchmarks of a folder at small sizes; return the process and what it wrote to `results`."""
    options = ["-q", "--import-mode=importlib", "--shapes=small", f"--benchmark-json={results}"]
    ran = run("-m", "pytest", "-p", "no:cacheprovider", *options, str(folder), cwd=folder.parent)
    return ran, json.loads(results.read_text())


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """The JSON file of all operators."""
    results = tmp_path_factory.mktemp("bench") / "operations.json"
    ran, _ = benchmark(ROOT / "bench" / "ops", results)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return results


def test_every_operator_is_checked_and_timed_in_both_directions(measured):
    result = json.loads(measured.read_text())
    assert result["ceilings"].keys() == {"flops", "bytes"}
    assert result["origin"]["versions"]["torch"]
    runs = [run["extra_info"] | run["stats"] for run in result["benchmarks"]]
    for implementation in ("bertfast", "definition"):
        timed = {(run["operation"], run["direction"]) for run in runs if run["implementation"] == implementation}
        both = dict.fromkeys(OPERATIONS, ("forward", "backward"))
        both["linear_cross_entropy"] = ("inference", "training")
        assert timed == {(name, direction) for name, directions in both.items() for direction in directions}
    for run in runs:
        assert 0 < run["p20_s"] <= run["median"] <= run["p80_s"], run
        assert run["lower_bound_s"] > 0, run
        assert run["roofline_efficiency"] == pytest.approx(run["lower_bound_s"] / run["median"], rel=1e-3)
        assert run["relative_error"] < 0.02, run
        assert run["bytes"] > 0, run


def test_the_report_has_tables_and_plots(measured, tmp_path):
    pytest.importorskip("matplotlib")
    ran = run("-m", "bench.report", str(measured), "--output", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert "| linear_cross_entropy | 9x48x100 | training |" in ran.stdout
    summary = (tmp_path / "summary.md").read_text()
    for name in OPERATIONS:
        assert f"\n## {name}\n" in summary
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "## Not timed" in summary


def test_the_report_names_missing_files():
    ran = run("-m", "bench.report", "nowhere.json")
    assert ran.returncode == 2
    assert "there is no nowhere.json" in ran.stderr


def test_the_report_leaves_out_files_that_are_not_complete(tmp_path):
    origin = {"processor": "a CPU", "python": "3.12", "versions": {}, "commit": ""}
    (tmp_path / "ceilings.json").write_text(json.dumps({"origin": origin, "ceilings": {"flops": 1e12, "bytes": 1e12}}))
    (tmp_path / "attention.json").write_text('{"benchmarks": [{"extra_info"')
    (tmp_path / "empty.json").touch()
    ran = run("-m", "bench.report", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert "Nothing was measured." in ran.stdout
    assert "## Ceilings" in (tmp_path / "summary.md").read_text()
    for name in ("attention", "empty"):
        assert f"{name}.json is left out: it is not complete JSON" in ran.stderr


def benchmark_square(folder: Path, factories: str) -> tuple[subprocess.CompletedProcess, dict]:
    """Benchmark the operation of this file with the given IMPLEMENTATIONS."""
    (folder / "ops").mkdir()
    (folder / "ops" / "conftest.py").write_text((ROOT / "bench" / "ops" / "conftest.py").read_text())
    (folder / "ops" / "square.py").write_text(f"{SQUARE}\n\nIMPLEMENTATIONS = {factories}\n")
    return benchmark(folder / "ops", folder / "square.json")


def test_wrong_or_broken_implementations_are_not_timed_and_an_interruption_keeps_results(tmp_path):
    names = ("backwards", "cube", "nothing", "broken", "interrupted")
    factories = ", ".join(f"{name!r}: {name}" for name in names)
    ran, result = benchmark_square(tmp_path, f'{{"bertfast": right, {factories}, "late": right}}')
    assert ran.returncode == 2, ran.stdout  # interrupted
    assert {run["extra_info"]["implementation"] for run in result["benchmarks"]} == {"bertfast", "backwards"}
    reasons = {entry["implementation"]: entry["reason"] for entry in result["not_timed"]}
    assert reasons.keys() == {"cube", "nothing", "broken"}
    assert reasons["cube"].startswith("not timed because its results are wrong: the relative error is")
    assert "the relative error is nan" in reasons["nothing"]
    assert reasons["broken"] == "RuntimeError: not available"


def test_a_killed_process_keeps_the_results_before(tmp_path):
    ran, result = benchmark_square(tmp_path, '{"bertfast": right, "cube": cube, "killed": killed, "late": right}')
    assert ran.returncode == -signal.SIGKILL, ran.stdout
    assert [run["extra_info"]["direction"] for run in result["benchmarks"]] == ["forward", "backward"]
    assert {entry["implementation"] for entry in result["not_timed"]} == {"cube"}
    assert result["origin"]["versions"]["torch"]
    assert result["ceilings"].keys() == {"flops", "bytes"}


def test_the_reasons_are_written_if_nothing_is_timed(tmp_path):
    _, result = benchmark_square(tmp_path, '{"broken": broken}')
    assert result["benchmarks"] == []
    assert {entry["reason"] for entry in result["not_timed"]} == {"RuntimeError: not available"}


@pytest.mark.parametrize("opened", [False, True])
def test_the_json_file_has_its_folder_in_every_version_of_pytest_benchmark(opened, tmp_path):
    path = tmp_path / "results" / "square.json"
    path.parent.mkdir()
    with path.open("wb") as file:
        config = SimpleNamespace(getoption=lambda *_: file if opened else path)
        assert json_file(config) == path
    assert json_file(SimpleNamespace(getoption=lambda *_: None)) is None


@pytest.mark.parametrize("name", ["bertfast", "bertfast-cuda"])
@pytest.mark.parametrize("implementation", ["cube", "broken"])
def test_a_wrong_or_broken_bertfast_fails_the_run(implementation, name, tmp_path):
    ran, result = benchmark_square(tmp_path, f'{{"{name}": {implementation}, "right": right}}')
    assert ran.returncode == 1, ran.stdout
    assert {run["extra_info"]["implementation"] for run in result["benchmarks"]} == {"right"}
    assert {entry["implementation"] for entry in result["not_timed"]} == {name}


def test_kernels_that_the_library_lacks_do_not_fail_the_run(tmp_path):
    ran, result = benchmark_square(tmp_path, '{"bertfast": right, "bertfast-cuda": unavailable}')
    assert ran.returncode == 0, ran.stdout
    assert "is not available: no nvcc" in result["not_timed"][0]["reason"]


def test_bertfast_in_bf16_must_be_as_accurate_as_pytorch():
    from bench.cases import checked
    from bench.ops.bias_gelu import CASES

    case = next(case for case in CASES["small"] if case.dtype == torch.bfloat16)

    def inexact(case):
        return lambda *inputs: 1.03 * case.definition(*inputs)

    assert checked(inexact, case, "torch")[2] is None
    assert "the relative error is 0.03, allowed is 0.0" in checked(inexact, case, "bertfast")[2]


def test_a_round_on_a_gpu_is_long_enough_although_launches_are_slow(monkeypatch):
    now, captured = [0.0], []

    def call():
        now[0] += 5e-3  # with its launch

    def capture(function):
        before = now[0]
        function()
        captured.append(round((now[0] - before) / 5e-3))
        return SimpleNamespace(replay=lambda: now.__setitem__(0, now[0] + 1e-3 * captured[-1]))

    def stopwatch(function):
        before = now[0]
        function()
        return now[0] - before

    monkeypatch.setattr(harness, "ON_GPU", True)
    monkeypatch.setattr(harness, "_capture", capture)
    monkeypatch.setattr(harness, "_never_synchronises", lambda call: True)
    monkeypatch.setattr(harness, "stopwatch", stopwatch)
    samples, clock = harness.device_seconds([call])
    assert clock == "graph"
    assert samples == pytest.approx([1e-3] * len(samples))
    assert captured == [2, 10]  # calls in a graph, of 2 ms and of harness.ROUND_SECONDS


def test_an_implementation_without_gradients_needs_no_memory_of_a_backward_pass(monkeypatch):
    from bench import cases
    from bench.ops.bias_gelu import CASES, gelu_out

    monkeypatch.setattr(cases, "ON_GPU", True)
    case = CASES["small"][0]
    assert cases.extra_memory(case, gelu_out(case)) is None


def program(name: str, *options: str) -> subprocess.CompletedProcess:
    """Run a program of `bench` on one thread."""
    ran = run("-m", f"bench.{name}", *options)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran


def test_operators_on_a_cpu_are_timed_alternately_in_both_precisions(tmp_path):
    options = ("--shapes=small", "--seconds=0.01", f"--results={tmp_path}")
    ran = program("cpu_operators", "attention", "bias_gelu", *options)
    assert "| bias_gelu | 40x96-fp32 | backward |" in ran.stdout
    result = json.loads((tmp_path / "cpu_operators.json").read_text())
    runs = [run["extra_info"] for run in result["benchmarks"]]
    for case in ("40x96", "40x96-fp32"):
        timed = {(run["implementation"], run["direction"]) for run in runs if run["case"] == case}
        both = {(name, direction) for name in ("bertfast", "torch") for direction in ("forward", "backward")}
        assert timed >= both | {("gelu.out", "forward")}
    assert {run["implementation"] for run in runs if run["operation"] == "attention"} >= {
        "bertfast",
        "sdpa",
        "sdpa-loop",
    }
    assert all(run["roofline_efficiency"] > 0 and run["relative_time"] > 0 for run in runs)
    assert all(run["relative_time"] == 1 for run in runs if run["implementation"] == "bertfast")


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
    assert harness.at_least_one("12") == 12
    for text in ("0", "-1", "1.5", "one"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a positive integer: type 1 or more"):
            harness.at_least_one(text)
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
    assert harness.changed_files(tmp_path) == []
    for name in names[2:]:
        (tmp_path / name).write_text("changed")
    assert harness.changed_files(tmp_path) == list(names[2:])


def test_without_a_repository_nothing_is_uncommitted(tmp_path):
    assert harness.changed_files(tmp_path) == []


def test_without_a_repository_the_commit_is_that_of_a_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("BERTFAST_COMMIT", raising=False)
    assert harness.commit_of(tmp_path, False) == ""
    monkeypatch.setenv("BERTFAST_COMMIT", "0123456789ab")
    assert harness.commit_of(tmp_path, False) == "0123456789ab"
    commit(tmp_path, "setup.py")
    assert re.fullmatch("[0-9a-f]{12}", harness.commit_of(tmp_path, False))
    assert harness.commit_of(tmp_path, True).endswith("+changes")


def test_results_of_an_unknown_commit_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(harness, "_CHANGED", [])
    monkeypatch.setattr(harness, "_COMMIT", "")
    with pytest.raises(SystemExit, match="set BERTFAST_COMMIT to the commit of these files"):
        harness.require_clean_tree(tmp_path / "results" / "any.json")
    harness.require_clean_tree(tmp_path / "elsewhere")


def test_the_library_of_a_result_is_identified(monkeypatch, tmp_path):
    (tmp_path / "library.so").write_bytes(b"code")
    built = CudaBuild(nvcc="13.0.88", reason=None, architectures={}, missing={}, slow={}, commit="0123-dirty")
    monkeypatch.setattr(harness.cuda_build, "BUILD", built)
    monkeypatch.setattr(harness.native, "UNAVAILABLE_REASON", None)
    monkeypatch.setattr(harness.native, "path", lambda: tmp_path / "library.so")
    found = harness._library()
    assert (found["nvcc"], found["commit"], len(found["sha256"])) == ("13.0.88", "0123-dirty", 16)
    monkeypatch.setattr(harness.native, "UNAVAILABLE_REASON", "not built")
    assert harness._library() == {}


def test_results_of_uncommitted_code_are_rejected_in_the_repository_only(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(harness, "_CHANGED", ["setup.py"])
    monkeypatch.setattr(harness, "_COMMIT", "0123456789ab+changes")
    with pytest.raises(SystemExit, match=r"uncommitted changes \(setup.py\): commit them, or .* --results"):
        harness.require_clean_tree(tmp_path / "results" / "avx512")
    with pytest.raises(SystemExit):
        harness.write_result("any", {}, tmp_path / "results")
    assert not (tmp_path / "results").exists()
    assert harness.write_result("any", {}, tmp_path / "elsewhere").exists()
    monkeypatch.setattr(harness, "_CHANGED", [])
    harness.require_clean_tree(tmp_path / "results")


@pytest.mark.parametrize("path", sorted((ROOT / "bench").rglob("*.py")), ids=lambda path: path.stem)
def test_every_program_checks_the_tree_before_it_measures(path):
    source = path.read_text()
    writes = any(text in source for text in ("write_result(", "result_parser(", "RESULTS /", "--results"))
    if path.stem != "harness" and writes:
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
