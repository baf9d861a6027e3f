"""The benchmarks of operators check before they time, keep their results, and are reported next to predictions."""

import json
import signal
import subprocess
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_bench import program, run

from bench import cases, gpu_check, harness
from bench.kernel_times import by_kernel
from bench.ops import attention, bias_gelu
from bench.ops.conftest import json_file
from bench.part_runner import with_site
from bench.report import summary
from bench.sass_model.predictions import predicted_times

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
    for entry in runs:
        assert 0 < entry["p20_s"] <= entry["median"] <= entry["p80_s"], entry
        assert entry["lower_bound_s"] > 0, entry
        assert entry["roofline_efficiency"] == pytest.approx(entry["lower_bound_s"] / entry["median"], rel=1e-3)
        assert entry["relative_error"] < 0.02, entry
        assert entry["bytes"] > 0, entry


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
    origin = {"processor": "a CPU", "threads": 1, "python": "3.12", "versions": {}, "commit": ""}
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
    case = next(case for case in bias_gelu.CASES["small"] if case.dtype == torch.bfloat16)

    def inexact(case):
        return lambda *inputs: 1.03 * case.definition(*inputs)

    assert cases.checked(inexact, case, "torch")[2] is None
    assert "the relative error is 0.03, allowed is 0.0" in cases.checked(inexact, case, "bertfast")[2]


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
    monkeypatch.setattr(cases, "ON_GPU", True)
    case = bias_gelu.CASES["small"][0]
    assert cases.extra_memory(case, bias_gelu.gelu_out(case)) is None


def test_the_launches_of_calls_are_grouped_by_kernel():
    launches = [
        ("attention_forward_kernel", 3.0),
        ("void bertfast::cuda::delta_kernel<c10::BFloat16, (int)64>(bertfast::cuda::AttentionBackward)", 1.0),
        ("void at::native::(anonymous namespace)::sum_kernel<Op<float> >(at::Tensor)", 5.0),
        ("attention_forward_kernel", 5.0),
    ]
    assert by_kernel(launches, calls=2) == {
        "attention_forward_kernel": {"launches": 1, "median_s": 4.0},
        "delta_kernel<BFloat16, 64>": {"launches": 0.5, "median_s": 1.0},
        "sum_kernel<Op<float>>": {"launches": 0.5, "median_s": 5.0},
    }


def test_the_report_compares_each_kernel_with_its_prediction():
    case = next(case for case in attention.CASES["main"] if str(case) == "512-d64-p0.1")
    call = {"operation": "attention", "case": str(case), "direction": "forward", "implementation": "bertfast"}
    call["predicted_case"] = case.predicted_case
    expected = predicted_times()["attention_forward, length 512, dropout"]
    in_cuda = predicted_times()["attention_forward_kernel<BFloat16, 64>, length 512, dropout"]
    seconds = {
        "attention_forward_kernel": 2e-6 * expected,
        "attention_forward_kernel<BFloat16, 64>": 1e-6 * in_cuda,
        "fill": 1e-6,
    }
    kernels = {name: {"launches": 1.0, "median_s": elapsed} for name, elapsed in seconds.items()}
    text = summary([{"kernels": [call | {"kernels": kernels}]}])
    row = "| attention | 512-d64-p0.1 | forward | bertfast |"
    assert f"{row} attention_forward_kernel | 1 | {2 * expected:.4g} | {expected:g} | 2.00 |" in text
    assert f"{row} attention_forward_kernel<BFloat16, 64> | 1 | {in_cuda:.4g} | {in_cuda:g} | 1.00 |" in text
    assert f"{row} fill | 1 | 1 |  |  |" in text


def test_the_predicted_cases_of_benchmarks_are_on_the_page():
    sizes = {key.partition(", ")[2] for key in predicted_times() if "<" not in key}
    found = {
        (name, str(case)): case.predicted_case in sizes
        for name in OPERATIONS
        for shape in ("main", "predicted")
        for case in import_module(f"bench.ops.{name}").CASES.get(shape, [])
    }
    assert {name for name, is_predicted in found.items() if is_predicted} >= {
        ("attention", "2048-d64-p0.1"),
        ("attention", "4-to-512-d64-p0.1"),
        ("attention", "512-d128-p0.1"),
        ("attention", "512-d64-w64"),
        ("add_layer_norm", "32768x768-fp32-stream-p0.1"),
        ("bias_gelu", "32768x3072"),
        ("embeddings", "32768x768-128-3932-masked-p0.1"),
        ("gated_activation", "32768x1152-gelu"),
        ("linear_cross_entropy", "5000x768x30522-all-rows"),
        ("linear_gelu", "32768x768x3072"),
        ("pre_norm", "32768x768"),
        ("rotary", "32768x12-d64"),
    }
    assert not found["pre_norm", "32768x768-rms"]


def test_kernels_are_timed_at_all_predicted_sizes(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "ON_GPU", True)
    commands = {part.name: part.commands[0] for part in gpu_check.prediction_parts(tmp_path, None)}
    ran = subprocess.run(
        [*commands["predicted kernels"], "--collect-only"],
        cwd=ROOT,
        env=with_site(str(ROOT)) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for text in (
        "attention.py::test_attention[2048-d64-bertfast-forward]",
        "attention.py::test_attention[4-to-512-d64-p0.1-bertfast-backward]",
        "linear_cross_entropy.py::test_linear_cross_entropy[5000x768x30522-all-rows-bertfast-training]",
        "rotary.py::test_rotary[32768x12-d64-bertfast-forward]",
    ):
        assert f"bench/ops/{text}" in ran.stdout
    tests = [line for line in ran.stdout.splitlines() if "::" in line]
    assert all("-bertfast-" in test for test in tests)


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
