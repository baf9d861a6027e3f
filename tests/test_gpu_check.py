"""`make gpu-check-accuracy` and `gpu-check-speed` on a machine without a GPU and with few packages."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu_check, part_runner
from bench.part_runner import Part
from bertfast.cli import self_test
from bertfast.ops import cuda_build, native

pytestmark = pytest.mark.slow

ROOT = part_runner.ROOT
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


@pytest.fixture
def on_gpu(monkeypatch):
    """List the parts of a machine with a GPU."""
    monkeypatch.setattr(gpu_check, "ON_GPU", True)


def printing(text: str, status: int = 0) -> list[str]:
    """Return a command that prints a text and exits with a status."""
    return [sys.executable, "-c", f"print({text!r}); raise SystemExit({status})"]


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
        assert re.search(r"self-test .* passed: (\d+) of \1 checks passed, 0 were not reached\.", ran.stdout)
    elif check == "predictions":
        assert run == ["ceilings", "step of bertfast pretrain", "report"]
        assert "\n## The step of bertfast pretrain\n\n| case |" in ran.stdout
    else:
        assert run == ["ceilings", "pretraining step", "attention", "report"]
        assert json.loads(files["pretraining_step-trial.json"])["ratios"].keys() == {"transformers-sdpa"}
        for section in ("## Ceilings", "## One pre-training step", "## attention"):
            assert section in files["summary.md"]
        assert "\n## One pre-training step\n\n| case |" in ran.stdout
        ceilings = json.loads(files["ceilings.json"])["ceilings"]
        assert json.loads(files["attention.json"])["ceilings"] == ceilings
    assert all(parts[name]["status"] == "passed" for name in run)
    assert all(part["last_line"] == "there is no GPU" for name, part in parts.items() if name not in run)


@pytest.mark.parametrize("check", gpu_check.LIMITS)
def test_with_a_gpu_every_part_runs_existing_files(check, tmp_path, on_gpu):
    parts = list(gpu_check.parts(check, tmp_path, no_library=None, probes="/folder/probes.so"))
    assert [part.name for part in parts] == list(gpu_check.LIMITS[check])
    for part in parts:
        assert part.skip is None, part
        for argument in (argument for command in part.commands for argument in command):
            file = ROOT / argument.partition("::")[0]
            assert not argument.startswith(("bench/", "tests/")) or file.exists(), part
            if argument.startswith("bench."):
                assert (ROOT / argument.replace(".", "/")).with_suffix(".py").exists(), part


def collected(command: list[str]) -> list[str]:
    """Return the tests that a command of pytest selects, in their order."""
    environment = part_runner.with_site(str(ROOT)) | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*command, "--collect-only"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return [line for line in ran.stdout.splitlines() if "::" in line]


def test_the_graph_of_a_step_is_checked_in_every_precision(on_gpu):
    parts = {part.name: part for part in gpu_check.accuracy_parts(None, None)}
    first, *others = parts["graph capture"].commands
    tests = [f"{gpu_check.GRAPH_TEST}[{kind}]" for kind in ("adamw", "bf16, no pairs", "a scaled loss")]
    assert collected([*first, *(command[-1] for command in others)]) == tests


@pytest.mark.parametrize("part", ["attention", "other operators"])
def test_benchmarks_select_the_implementations_to_measure_and_begin_with_bertfast(part, on_gpu, tmp_path):
    commands = {part.name: part.commands for part in gpu_check.speed_parts(tmp_path, None)}
    found = collected(commands[part][0])
    on_cpu = ("-bertfast-p0-", "-bertfast-full-")  # which no GPU has
    found = [name for name in found if not any(text in name for text in on_cpu)]
    attention, *others = gpu_check.OPERATORS
    expected = []
    for operator in [attention] if part == "attention" else others:
        module = import_module(f"bench.ops.{operator}")
        names = ("bertfast", "varlen_attn", "sdpa-cudnn") if operator == attention else module.IMPLEMENTATIONS
        expected += [
            (name, f"bench/ops/{operator}.py::test_{operator}[{case}-{name}-{direction}]")
            for case in module.CASES["main"]
            for name in names
            for direction in case.directions
            if name not in ("definition", "bertfast-cuda")
        ]
    assert sorted(found) == sorted(name for _, name in expected)
    of_bertfast = {name for implementation, name in expected if implementation == "bertfast"}
    assert set(found[: len(of_bertfast)]) == of_bertfast


def test_the_self_tests_cover_every_triton_kernel_once(on_gpu):
    """The name of each check of a Triton kernel contains all words of exactly one command."""
    chosen = [set(command[4:]) for command in gpu_check.self_tests()]
    for check, *_ in self_test._groups(torch.device("cpu"), ()):
        words = replace(check, implementation="triton").words
        assert sum(some <= words for some in chosen) == 1, words


def test_a_self_test_that_does_not_reach_all_checks_fails():
    environment = part_runner.with_site(str(ROOT)) | {"OMP_NUM_THREADS": "1", part_runner.END: "0"}
    command = gpu_check.self_test("cpu", "bias_gelu", "fp32")
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 1, ran.stderr
    *_, row, _, counts = ran.stdout.splitlines()
    assert row.endswith("NOT REACHED: the time limit of 0 s is over")
    assert re.fullmatch(r"0 of (\d+) checks passed, \1 were not reached\.", counts)


def test_missing_requirements_are_skipped_with_a_reason(on_gpu, tmp_path):
    no_library = "not available: no native library"
    skipped = {part.name: part.skip for part in gpu_check.accuracy_parts(no_library, None)}
    assert skipped["self-test"] is None
    assert skipped["CUDA C++ self-test"] == no_library
    assert skipped["layout probes"] == "not available: no --probes, which `make wheel` builds"
    skipped = {part.name: part.skip for part in gpu_check.speed_parts(tmp_path, no_library)}
    assert skipped["CUDA C++ kernels"] == no_library


def test_prebuilt_probes_need_no_compiler(on_gpu):
    probes = next(part for part in gpu_check.accuracy_parts(None, "/folder/probes.so") if part.name == "layout probes")
    assert probes.skip is None
    assert probes.environment == {"BERTFAST_PROBES": "/folder/probes.so"}


def test_a_library_that_the_driver_does_not_support_counts_as_missing(on_gpu, monkeypatch):
    monkeypatch.setattr(native, "UNAVAILABLE_REASON", None)
    built = cuda_build.CudaBuild("13.1.80", None, {"bias_gelu": ["90a"]}, {}, {})
    monkeypatch.setattr(cuda_build, "BUILD", built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda_build, "driver_cuda_version", lambda: (12, 4))
    assert "the driver is for CUDA 12.4" in gpu_check.missing_library()
    monkeypatch.setattr(cuda_build, "driver_cuda_version", lambda: (13, 0))
    assert gpu_check.missing_library() is None


def test_a_machine_on_which_triton_cannot_launch_gets_a_message(on_gpu, monkeypatch):
    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr("triton.runtime.driver", Driver())
    error = gpu_check.launch_error()
    assert "a C compiler (gcc, clang or that in CC) and Python.h" in error
    assert error.endswith(": Failed to find C compiler.")
    works = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0))
    monkeypatch.setattr("triton.runtime.driver", works)
    assert gpu_check.launch_error() is None


@pytest.mark.parametrize(
    ("status", "accuracy", "speed"),
    [
        ("passed", 0, 0),
        ("skipped", 0, 0),
        ("failed", 1, 1),
        (part_runner.STOPPED, 1, 0),
        (part_runner.NOT_REACHED, 1, 0),
    ],
)
def test_an_accuracy_check_that_is_not_complete_fails(status, accuracy, speed):
    outcomes = [part_runner.Outcome("self-test", "passed", 1.0, ""), part_runner.Outcome("any", status, 1.0, "")]
    assert gpu_check.exit_status("accuracy", outcomes) == accuracy
    assert gpu_check.exit_status("speed", outcomes) == speed


def test_a_part_over_its_limit_is_stopped_with_its_children_and_keeps_its_output(tmp_path, monkeypatch):
    monkeypatch.setattr(part_runner, "GRACE", 1)
    code = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("measured", child.pid, flush=True)
time.sleep(60)
"""
    started = time.monotonic()
    outcome = part_runner.run(Part("ceilings", [[sys.executable, "-c", code]]), tmp_path, "", 3)
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


def test_a_check_that_is_terminated_ends_its_commands(tmp_path):
    code = f"""
import sys
from pathlib import Path
from bench import part_runner
part_runner.exit_on_signals()
command = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
part_runner.run(part_runner.Part("ceilings", [command]), Path({str(tmp_path)!r}), "", 60)
"""
    check = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=part_runner.with_site(str(ROOT)))
    log, until = tmp_path / "ceilings.log", time.monotonic() + 30
    while not (log.exists() and log.read_text().count("\n") == 2) and time.monotonic() < until:
        time.sleep(0.05)
    child = int(log.read_text().splitlines()[1])
    assert os.getsid(child) == os.getsid(check.pid)
    check.terminate()
    assert check.wait(30) == 128 + signal.SIGTERM
    assert not running(child)


def test_a_part_fails_if_one_of_its_commands_does(tmp_path):
    outcome = part_runner.run(Part("self-test", [printing("number 0"), printing("number 1", 1)]), tmp_path, "", 60)
    assert (outcome.status, outcome.last_line) == ("failed", "number 1")
    assert "number 0" in (tmp_path / "self-test.log").read_text()


def test_the_counts_of_self_tests_are_added_and_every_failure_is_named(tmp_path):
    failed = "attention triton bf16 4x512 D=64 on cuda: failed: output"
    commands = [
        printing("5 of 5 checks passed, 0 were not reached."),
        printing(f"1 failed; please report them:\n  {failed}\n2 of 4 checks passed, 1 were not reached.", 1),
        printing("attention            triton    fp16      4x512 D=64", -signal.SIGSEGV),
    ]
    outcome = part_runner.run(Part("self-test", commands), tmp_path, "", 60)
    assert outcome.status == "failed"
    assert outcome.last_line == "7 of 9 checks passed, 1 were not reached; 1 of 3 processes did not finish."
    assert outcome.problems == (
        f"self-test_1.log: {failed}",
        "self-test_1.log: 2 of 4 checks passed, 1 were not reached.",
        "self-test_2.log: attention triton fp16 4x512 D=64",
    )


def test_the_tar_file_is_updated_while_a_part_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(part_runner, "PACKING", 0.2)
    folder, target = tmp_path / "work", tmp_path / "gpu-check-accuracy.tar"
    folder.mkdir()
    seen = []

    def keep():
        part_runner.pack(folder, target)
        seen.append(members(target)["ceilings.log"])

    code = "import time; print('measured', flush=True); time.sleep(30)"
    part_runner.run(Part("ceilings", [[sys.executable, "-c", code]]), folder, "", 3, keep)
    assert "measured" in seen[-1]
    assert not target.with_suffix(".unfinished").exists()


def test_a_file_that_shrinks_while_it_is_packed_does_not_end_the_check(tmp_path, monkeypatch):
    folder, target, calls = tmp_path / "work", tmp_path / "gpu-check-speed.tar", []
    folder.mkdir()

    def pack(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError("unexpected end of data")
        part_runner.pack(*arguments)

    monkeypatch.setattr(gpu_check, "pack", pack)
    parts = iter([Part("ceilings", [printing("measured")])])
    outcomes = gpu_check.run_all(parts, "speed", folder, "", target, time.monotonic() + 60, {})
    assert [outcome.status for outcome in outcomes] == ["passed"]
    assert len(calls) > 1
    assert "measured" in members(target)["ceilings.log"]


def test_a_part_without_time_is_not_reached(tmp_path):
    part = Part("layout probes", [["never"]])
    assert part_runner.run(part, tmp_path, "", 0).last_line == "no time is left"
    assert part_runner.run(part, tmp_path, "", -3.5).status == "not reached"


@pytest.mark.parametrize(("check", "minutes"), [("accuracy", 3), ("speed", 6), ("predictions", 4)])
def test_the_limits_fit_into_the_budget(check, minutes):
    assert gpu_check.BUDGET[check] == 60 * minutes
    assert sum(gpu_check.LIMITS[check].values()) + gpu_check.RESERVE <= gpu_check.BUDGET[check]
    assert gpu_check.RESERVE > 2 * part_runner.GRACE


def test_the_documented_limits_are_those_of_the_program():
    text = (ROOT / "docs" / "KERNELS.md").read_text(encoding="utf-8")
    section = text.partition("### Checking the kernels on a GPU")[2].partition("\n## ")[0]
    limits = [limit for of_check in gpu_check.LIMITS.values() for limit in of_check.values()]
    assert [int(limit) for limit in re.findall(r"^\|.*\| (\d+) s \|$", section, re.MULTILINE)] == limits


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
