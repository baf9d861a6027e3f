"""No kernel touches memory behind its tensors: each operation runs in a process of its own, which would crash."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from guarded import CASES
from helpers import DEVICE, KERNELS

SCRIPT = Path(__file__).with_name("guarded.py")

pytestmark = [
    pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU's memory has no such pages"),
    pytest.mark.one_instruction_set,  # the script runs them all
]


def run(case: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, case], capture_output=True, text=True)


@pytest.mark.parametrize("case", [name for name in CASES if name != "outside"])
def test_nothing_outside_is_touched(case):
    ran = run(case)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "nothing outside was touched\n"


def test_what_is_outside_would_be_noticed():
    ran = run("outside")
    if KERNELS == "cuda":  # the emulation tells who it was
        assert "accesses no memory, out of bounds" in ran.stderr
    else:
        assert ran.returncode == -signal.SIGSEGV
