"""`make gpu-check-accuracy` and `gpu-check-speed` on a machine without a GPU and with few packages."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_check

pytestmark = pytest.mark.slow

ROOT = gpu_check.ROOT
# Hides what a GPU machine may lack: packages that transformers does not require, and the native library.
BARE = """
import sys
from functools import partial
from importlib.machinery import PathFinder

MISSING = {"tyro", "matplotlib", "pybind11", "liger_kernel", "cut_cross_entropy"}


class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def without_library(original, name, *where):
    return None if name == "bertfast._C" else original(name, *where)


PathFinder.find_spec = partial(without_library, PathFinder.find_spec)
sys.meta_path.insert(0, Missing)
"""
no_gpu_here = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU this takes minutes: make gpu-check")


def run_check(*options: str, path: Path | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{path or ''}"}
    command = [sys.executable, "-m", "bench.gpu_check", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def members(archive: Path) -> dict[str, str]:
    """Return the texts of the files in a tar file by name."""
    with tarfile.open(archive) as files:
        return {Path(one.name).name: files.extractfile(one).read().decode() for one in files.getmembers()}


@pytest.fixture
def bare(tmp_path) -> Path:
    """A folder for PYTHONPATH that hides what a GPU machine may lack."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BARE)
    return folder


@no_gpu_here
@pytest.mark.parametrize("check", gpu_check.LIMITS)
def test_each_check_runs_in_a_bare_environment_and_writes_one_tar_file(check, bare, tmp_path):
    ran = run_check(check, "--results", str(tmp_path / "results"), path=bare)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert [file.name for file in (tmp_path / "results").iterdir()] == [f"gpu-check-{check}.tar"]
    files = members(tmp_path / "results" / f"gpu-check-{check}.tar")
    parts = {part["name"]: part for part in json.loads(files["gpu_check.json"])["parts"]}
    assert list(parts) == list(gpu_check.LIMITS[check])
    run = [name for name, part in parts.items() if part["status"] != "skipped"]
    if check == "accuracy":
        assert run == ["self-test"]
        assert "library    none" in files["self-test.log"]
        assert "checks passed, 0 were not reached" in files["self-test.log"]
    else:
        assert run == ["ceilings", "pretraining step", "attention", "report"]
        assert json.loads(files["pretraining_step-trial.json"])["ratios"].keys() == {"transformers-sdpa"}
        for section in ("## Ceilings", "## One pre-training step", "## attention"):
            assert section in files["summary.md"]
    assert all(parts[name]["status"] == "passed" for name in run)
    assert all(part["last_line"] == "there is no GPU" for name, part in parts.items() if name not in run)


@pytest.mark.parametrize("check", gpu_check.LIMITS)
def test_with_a_gpu_every_part_runs_existing_files(check, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ON_GPU", True)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: name)
    parts = list(gpu_check.parts(check, tmp_path, no_library=None, probes=None))
    assert [part.name for part in parts] == list(gpu_check.LIMITS[check])
    for part in parts:
        assert part.skip is None, part
        for argument in (argument for command in part.commands for argument in command):
            assert not argument.startswith(("bench/", "tests/")) or (ROOT / argument).exists(), part
            if argument.startswith("bench."):
                assert (ROOT / argument.replace(".", "/")).with_suffix(".py").exists(), part


def test_the_self_tests_cover_every_triton_kernel_once(monkeypatch):
    """The name of each check of a Triton kernel contains all words of exactly one command."""
    from bertfast.cli import self_test

    monkeypatch.setattr(gpu_check, "ON_GPU", True)
    chosen = [set(command[5:]) for command in gpu_check.self_tests(60)]
    for problem in self_test.problems(torch.device("cpu")):
        for precision in ("bf16", "fp32", "fp16"):
            words = {problem.operator, "triton", precision, *problem.shape.split()}
            assert sum(some <= words for some in chosen) == 1, words


def test_missing_requirements_are_skipped_with_a_reason(monkeypatch):
    monkeypatch.setattr(gpu_check, "ON_GPU", True)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    skipped = {part.name: part.skip for part in gpu_check.accuracy_parts("not available: no native library", None)}
    assert skipped["self-test"] is None
    assert skipped["CUDA C++ self-test"] == "not available: no native library"
    assert skipped["layout probes"] == "not available: neither --probes nor nvcc"
    assert skipped["memcheck"] == "there is no compute-sanitizer"


def test_prebuilt_probes_need_no_compiler(monkeypatch):
    monkeypatch.setattr(gpu_check, "ON_GPU", True)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    probes = next(part for part in gpu_check.accuracy_parts(None, "/folder/probes.so") if part.name == "layout probes")
    assert probes.skip is None
    assert probes.environment == {"BERTFAST_PROBES": "/folder/probes.so"}


def test_a_part_over_its_limit_is_stopped_with_its_children_and_keeps_its_output(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 1)
    code = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("measured", child.pid, flush=True)
time.sleep(60)
"""
    started = time.monotonic()
    outcome = gpu_check.run(gpu_check.Part("ceilings", [[sys.executable, "-c", code]]), tmp_path, "", 3)
    assert outcome.status == "stopped at its limit"
    assert time.monotonic() - started < 12
    word, child = outcome.last_line.split()
    assert word == "measured"
    until = time.monotonic() + 5
    while running(int(child)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not running(int(child))


def running(process: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_part_fails_if_one_of_its_commands_does(tmp_path):
    commands = [[sys.executable, "-c", f"print('number {i}'); raise SystemExit({i})"] for i in range(2)]
    outcome = gpu_check.run(gpu_check.Part("self-test", commands), tmp_path, "", 60)
    assert (outcome.status, outcome.last_line) == ("failed", "number 1")
    assert "number 0" in (tmp_path / "self-test.log").read_text()


def test_the_tar_file_is_updated_while_a_part_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "PACKING", 0.2)
    folder, target = tmp_path / "work", tmp_path / "gpu-check-accuracy.tar"
    folder.mkdir()
    seen = []

    def keep():
        gpu_check.pack(folder, target)
        seen.append(members(target)["ceilings.log"])

    code = "import time; print('measured', flush=True); time.sleep(30)"
    gpu_check.run(gpu_check.Part("ceilings", [[sys.executable, "-c", code]]), folder, "", 3, keep)
    assert "measured" in seen[-1]
    assert not target.with_suffix(".unfinished").exists()


def test_a_part_is_skipped_without_time(tmp_path):
    part = gpu_check.Part("memcheck", [["never"]])
    assert gpu_check.run(part, tmp_path, "", 0).last_line == "no time is left"
    assert gpu_check.run(part, tmp_path, "", -3.5).status == "skipped"


@pytest.mark.parametrize(("check", "minutes"), [("accuracy", 3), ("speed", 6)])
def test_the_limits_fit_into_the_budget(check, minutes):
    assert gpu_check.BUDGET[check] == 60 * minutes
    assert sum(gpu_check.LIMITS[check].values()) + gpu_check.RESERVE <= gpu_check.BUDGET[check]
    assert gpu_check.RESERVE > 2 * gpu_check.GRACE


def test_the_checkout_is_importable_as_the_package(tmp_path):
    gpu_check.lay_out(tmp_path / "bertfast")
    code = "import bertfast, bertfast.kernels as kernels; print(bertfast.__file__, kernels.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count(str(tmp_path)) == 2


def test_wrong_arguments_get_a_message(tmp_path):
    ran = run_check("accuracy", "--wheel", str(tmp_path / "none.whl"))
    assert ran.returncode == 2
    assert "--wheel: there is no file" in ran.stderr
    (tmp_path / "broken-0.1-py3-none-any.whl").write_text("no wheel")
    wheel = str(tmp_path / "broken-0.1-py3-none-any.whl")
    ran = run_check("accuracy", "--wheel", wheel, "--results", str(tmp_path / "results"))
    assert ran.returncode == 1
    assert "broken-0.1-py3-none-any.whl cannot be installed" in ran.stderr
    (tmp_path / "file").touch()
    ran = run_check("speed", "--results", str(tmp_path / "file" / "folder"))
    assert ran.returncode == 2
    assert "cannot be created" in ran.stderr


def test_a_python_without_pytorch_gets_a_message():
    # -S leaves out site-packages; only the checkout is on the path.
    command = [sys.executable, "-S", "-m", "bench.gpu_check", "accuracy"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    checked = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert checked.returncode == 1
    assert checked.stderr.endswith("has no PyTorch: name another Python: make gpu-check PYTHON=.venv/bin/python\n")
