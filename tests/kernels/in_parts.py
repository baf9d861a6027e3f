"""Run the tests of the kernels in as many processes as there are processors, 8 at most, each a part of them.

    python tests/kernels/in_parts.py [OPTION OF PYTEST …]

Compiling takes most of their time on a GPU, and interpreting without one; either uses one processor.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PARTS = min(os.cpu_count() or 1, 8)


def run(part: int) -> int:
    """The exit status of a part, whose output is printed when it has ended."""
    command = [sys.executable, "-m", "pytest", "-q", f"--part={part}/{PARTS}", *sys.argv[1:], "tests/kernels"]
    root = Path(__file__).parents[2]
    ran = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"part {part} of {PARTS}\n{ran.stdout}", flush=True)
    return ran.returncode


if __name__ == "__main__":
    with ThreadPoolExecutor(PARTS) as pool:
        statuses = list(pool.map(run, range(1, PARTS + 1)))
    print(f"kernels: {statuses.count(0)} of {PARTS} parts passed")
    sys.exit(any(statuses))
