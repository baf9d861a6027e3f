"""Points of a sweep, each measured in a process of its own whose peak memory counts."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.harness import seconds_of, side_by_side
from bench.result_files import ROOT
from bertfast.runtime.malloc import resident_memory

REPEATS = 5
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def importing_bench() -> dict[str, str]:
    """Return the environment of a process that imports `bench`, which is not installed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def in_a_process(module: str, options: Sequence[str]) -> dict[str, Any]:
    """Run a module below `bench` and return what its last line contains, or the reason of a failure as "reason"."""
    command = [sys.executable, "-m", f"bench.{module}", *options]
    ran = subprocess.run(command, capture_output=True, text=True, env=importing_bench())
    if ran.returncode:
        lines = [line for line in ran.stderr.splitlines() if line.strip()]
        return {"reason": lines[-1] if lines else f"exit status {ran.returncode}"}
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result


def peak_memory() -> int:
    """Return the peak memory of this program in bytes; `ru_maxrss` would include that of the parent process."""
    status = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def restart_peak() -> int:
    """Let `peak_memory` start from the resident memory of now, which is returned in bytes.

    Otherwise the memory of building a model or of drawing random weights could hide that of the first call. Where the
    system does not allow it, the peak until now is returned, and growth below it is not seen.
    """
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return peak_memory()
    return resident_memory()


def timed(call: Callable[[], object], repeats: int = REPEATS, *, warm: bool = False) -> dict[str, Any]:
    """Return the median seconds of a call and all samples, after an untimed call unless it has run already."""
    samples = seconds_of(side_by_side({"call": call}, repeats, warm=warm)["call"])
    return {"seconds": statistics.median(samples), "seconds_samples": samples}
