"""Run tests in as many processes as there are processors, 8 at most, each a part of them.

    python tests/in_parts.py [OPTION OF PYTEST …] [FILE OR FOLDER …]

Most tests use one processor. Those of the kernels do whether they compile, interpret or emulate.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROCESSORS = os.cpu_count() or 1
PARTS = min(PROCESSORS, 8)


def run(part: int) -> int:
    """The exit status of a part, whose output is printed when it has ended."""
    command = [sys.executable, "-m", "pytest", "-q", f"--part={part}/{PARTS}", *sys.argv[1:]]
    root = Path(__file__).parents[1]
    # More threads than processors wait for each other: twice the time.
    environment = os.environ | {"OMP_NUM_THREADS": str(PROCESSORS // PARTS)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ran = subprocess.run(command, cwd=root, env=environment, **pipes)
    print(f"part {part} of {PARTS}\n{ran.stdout}", flush=True)
    return ran.returncode


if __name__ == "__main__":
    with ThreadPoolExecutor(PARTS) as pool:
        statuses = list(pool.map(run, range(1, PARTS + 1)))
    print(f"{statuses.count(0)} of {PARTS} parts passed")
    sys.exit(any(statuses))
