"""No kernel accesses memory past its tensors: each operation runs in its own process, which would crash."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from guarded import CASES
from helpers import DEVICE, KERNELS

SCRIPT = Path(__file__).with_name("guarded.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE.type == "cuda", reason="GPU memory has no guard pages"),
    pytest.mark.one_instruction_set,  # the script runs all of them
]


def run(case: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, case], capture_output=True, text=True)


@pytest.mark.parametrize("case", [name for name in CASES if name != "out_of_bounds"])
def test_no_access_is_out_of_bounds(case):
    ran = run(case)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "no access out of bounds\n"


def test_an_access_out_of_bounds_is_detected():
    ran = run("out_of_bounds")
    if KERNELS == "cuda":  # the emulation reports the access
        assert "accesses no memory, out of bounds" in ran.stderr
    else:
        assert ran.returncode == -signal.SIGSEGV
