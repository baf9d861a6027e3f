"""`make gpu-check`, on a machine without a GPU: it runs, says what it skips, and keeps its limits."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import gpu_check

ROOT = gpu_check.ROOT


def check(*options: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "bench/gpu_check.py", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU this takes minutes: make gpu-check")
def test_without_a_gpu_it_runs_what_it_can_and_says_what_it_skips(tmp_path):
    ran = check("--fast", "--results", str(tmp_path))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    status = {part["name"]: part["status"] for part in result["parts"]}
    assert status.keys() == gpu_check.LIMITS.keys() - set(gpu_check.OPERATIONS)
    for name in ("ceilings", "operations", "report"):
        assert status[name] == "passed", ran.stdout
    assert "kernel tests              0 s  skipped: there is no GPU" in ran.stdout
    summary = (tmp_path / "summary.md").read_text()
    for section in ("## Parts", "## Ceilings", "## Operations: ours beside the fastest other", "## attention"):
        assert section in summary
    *_, row, _, last = ran.stdout.rstrip().splitlines()  # the short table, and where more is
    assert row.startswith("| linear_gelu |")
    assert last.endswith(str(tmp_path))


def test_with_a_gpu_the_parts_are_those_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ON_GPU", True)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: name)
    parts = list(gpu_check.parts(tmp_path, fast=False))
    assert [part.name for part in parts] == [name for name in gpu_check.LIMITS if name != "operations"]
    for part in parts:
        assert part.skip is None, part
        for argument in part.command:
            assert not argument.startswith(("bench/", "tests/ops", "tests/model")) or (ROOT / argument).exists(), part


def test_a_part_over_its_limit_is_stopped_with_all_it_started_and_keeps_its_output(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 1)
    code = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("measured", child.pid, flush=True)
time.sleep(60)
"""
    started = time.monotonic()
    outcome = gpu_check.run(gpu_check.Part("ceilings", [sys.executable, "-c", code]), tmp_path, "", 2)
    assert outcome.status == "stopped at its limit"
    assert time.monotonic() - started < 10
    word, child = outcome.last_line.split()
    assert word == "measured"
    until = time.monotonic() + 5
    while running(int(child)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not running(int(child))


def running(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_time_left_and_no_limit_leave_a_part_out(tmp_path):
    part = gpu_check.Part("memcheck", ["never"])
    assert gpu_check.run(part, tmp_path, "", 0).status == "skipped"
    assert gpu_check.run(part, tmp_path, "", -3.5).status == "skipped"


@pytest.mark.parametrize(("fast", "minutes"), [(False, 9), (True, 3)])
def test_the_limits_add_up(fast, minutes):
    assert gpu_check.TOTAL[fast] + gpu_check.LIMITS["report"][fast] + 2 * gpu_check.GRACE < 60 * minutes


def test_the_checkout_is_laid_out_as_the_package(tmp_path):
    gpu_check.lay_out(tmp_path / "bertfast")
    code = "import bertfast, bertfast.kernels as kernels; print(bertfast.__file__, kernels.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count(str(tmp_path)) == 2


def test_bad_input_gets_a_sentence(tmp_path):
    ran = check("--wheel", str(tmp_path / "none.whl"))
    assert ran.returncode == 2
    assert "there is no wheel" in ran.stderr
    (tmp_path / "broken-0.1-py3-none-any.whl").write_text("no wheel")
    ran = check("--wheel", str(tmp_path / "broken-0.1-py3-none-any.whl"), "--results", str(tmp_path / "results"))
    assert ran.returncode == 1
    assert "broken-0.1-py3-none-any.whl cannot be installed" in ran.stderr
    (tmp_path / "file").touch()
    ran = check("--results", str(tmp_path / "file"))
    assert ran.returncode == 2
    assert "results cannot be written to" in ran.stderr
