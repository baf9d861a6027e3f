"""What the benchmarks share: side-by-side timing, the matrix rate of the machine, and results with their origin."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "numpy", "tokenizers")


def side_by_side(functions: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, in turn A B A B …, after one uncounted round; so a drift of the machine hits all."""
    seconds = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """The median of the pairwise ratios of two functions timed in turn."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def matrix_rate(shapes: list[tuple[int, int, int]], dtype: torch.dtype, repeats: int = 3) -> float:
    """FLOP/s of the products [m, k] [k, n] of `shapes`, all in a row: the best of `repeats`."""
    operands = [(torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)) for m, k, n in shapes]
    work = sum(2 * m * k * n for m, k, n in shapes)

    def multiply() -> None:
        for a, b in operands:
            torch.nn.functional.linear(a, b)

    return work / min(side_by_side({"products": multiply}, repeats)["products"])


def origin() -> dict:
    """Where and with what a result was measured."""
    return {
        "date": date.today().isoformat(),
        "commit": _COMMIT,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def write_result(name: str, values: dict) -> Path:
    """Write `bench/results/NAME.json`: the values and their origin."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"origin": origin(), **values}, indent=1) + "\n", encoding="utf-8")
    return path


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(RESULTS.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {name.strip(): value.strip() for name, value in fields.items()}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in values.get("flags", "").split()]
    return f"{values.get('model name', platform.machine())} (family {values.get('cpu family')}, {' '.join(flags)})"


_COMMIT = _commit()  # of the code that runs, whatever is edited meanwhile


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
