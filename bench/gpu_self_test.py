"""Run some of the checks of `bertfast doctor --check` as a command of `bench.gpu_check`.

    python -m bench.gpu_self_test DEVICE [WORD …]

The words are those of `--only`. No check starts shortly before the end of the part; the exit status is 0 only if all
checks passed. Nothing is timed, because other commands use the GPU at the same time.
"""

from __future__ import annotations

import os
import sys
import time

from bench.part_runner import END
from bertfast.cli.doctor import print_environment, run_checks
from bertfast.runtime.precision import choose_device

MARGIN = 8  # seconds before the end of the part, after which no check starts


def main() -> int | str:
    name, *words = sys.argv[1:]
    device = choose_device(name)
    print_environment(device)
    left = float(os.environ.get(END, "inf")) - time.time() - MARGIN
    try:
        outcomes = run_checks([device], words, max(left, 0), timed=False)
    except KeyboardInterrupt:
        return "interrupted"  # after the columns of the check that runs
    return int(any(outcome.status != "passed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
