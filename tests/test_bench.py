"""The benchmarks of single operations run at small sizes, and say what they should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPERATIONS = {path.stem for path in (ROOT / "bench" / "ops").glob("*.py")} - {"conftest"}

CONTENDERS = """
from dataclasses import dataclass

import torch
from contest import Case, Contender, Work


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
    raise RuntimeError("there is no such thing here")


def interrupted(case):
    raise KeyboardInterrupt


def right(case):
    return torch.square


def backwards(case):
    return Contender(torch.square, lambda x: [x.flip(0)], lambda y: y.flip(0))


def cube(case):
    return lambda x: x * x * x


def nothing(case):
    return lambda x: x * x * float("nan")


CASES = {"small": [Square()]}


def test_square(measure):
    measure()
"""


def benchmark(folder: Path, results: Path) -> tuple[subprocess.CompletedProcess, dict]:
    """Run the benchmarks in a folder at small sizes: the process, and what it wrote to `results`."""
    options = ["-q", "--import-mode=importlib", "--shapes=small", f"--benchmark-json={results}"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True)
    return ran, json.loads(results.read_text())


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """The JSON of all operations."""
    results = tmp_path_factory.mktemp("bench") / "operations.json"
    ran, _ = benchmark(ROOT / "bench" / "ops", results)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return results


def test_every_operation_is_checked_and_timed_in_both_directions(measured):
    result = json.loads(measured.read_text())
    assert result["ceilings"].keys() == {"flops", "bytes"}
    assert result["origin"]["versions"]["torch"]
    runs = [run["extra_info"] | run["stats"] for run in result["benchmarks"]]
    for provider in ("bertfast", "definition"):
        timed = {(run["operation"], run["direction"]) for run in runs if run["provider"] == provider}
        both = dict.fromkeys(OPERATIONS, ("forward", "backward"))
        both["linear_cross_entropy"] = ("inference", "training")
        assert timed == {(name, direction) for name, directions in both.items() for direction in directions}
    for run in runs:
        assert 0 < run["p20_s"] <= run["median"] <= run["p80_s"], run
        assert run["floor_s"] > 0, run
        assert run["share_of_floor"] == pytest.approx(run["floor_s"] / run["median"], rel=1e-3)
        assert run["relative_error"] < 0.02, run
        assert run["bytes"] > 0, run


def test_the_report_has_tables_and_plots(measured, tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "bench/report.py", str(measured), "--output", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "| linear_cross_entropy | 9x48x100 | training |" in ran.stdout
    summary = (tmp_path / "summary.md").read_text()
    for name in OPERATIONS:
        assert f"\n## {name}\n" in summary
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "## Not timed" in summary


def test_the_report_says_what_is_missing():
    command = [sys.executable, "bench/report.py", "nowhere.json"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "there is no nowhere.json" in ran.stderr


def contest(folder: Path, providers: str) -> tuple[subprocess.CompletedProcess, dict]:
    """Benchmark an operation of this file with PROVIDERS as given."""
    (folder / "bench" / "ops").mkdir(parents=True)
    for name in ("harness.py", "contest.py", "ops/conftest.py"):
        (folder / "bench" / name).write_text((ROOT / "bench" / name).read_text())
    (folder / "bench" / "ops" / "square.py").write_text(f"{CONTENDERS}\n\nPROVIDERS = {providers}\n")
    return benchmark(folder / "bench" / "ops", folder / "square.json")


def test_what_is_wrong_or_cannot_run_is_not_timed_and_an_interruption_loses_nothing(tmp_path):
    names = ("backwards", "cube", "nothing", "broken", "interrupted")
    providers = ", ".join(f"{name!r}: {name}" for name in names)
    ran, result = contest(tmp_path, f'{{"bertfast": right, {providers}, "late": right}}')
    assert ran.returncode == 2, ran.stdout  # interrupted
    assert {run["extra_info"]["provider"] for run in result["benchmarks"]} == {"bertfast", "backwards"}
    reasons = {entry["provider"]: entry["reason"] for entry in result["not_timed"]}
    assert reasons.keys() == {"cube", "nothing", "broken"}
    assert reasons["cube"].startswith("wrong, so not timed: its relative error is")
    assert reasons["nothing"].endswith("nan")
    assert reasons["broken"] == "RuntimeError: there is no such thing here"


@pytest.mark.parametrize("ours", ["cube", "broken"])
def test_where_ours_is_wrong_or_broken_the_run_fails(ours, tmp_path):
    ran, result = contest(tmp_path, f'{{"bertfast": {ours}, "right": right}}')
    assert ran.returncode == 1, ran.stdout
    assert {run["extra_info"]["provider"] for run in result["benchmarks"]} == {"right"}
